#include "device/cuda/self_test_bench.h"
namespace qi::cuda {
void add_neuron_tests(std::vector<SelfTest>&) {}
}
