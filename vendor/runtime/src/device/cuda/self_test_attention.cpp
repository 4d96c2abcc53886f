#include "device/cuda/self_test_bench.h"
namespace qi::cuda {
void add_attention_tests(std::vector<SelfTest>&) {}
}
