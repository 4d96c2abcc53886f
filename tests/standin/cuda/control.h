// What the parts of the driver share beside its state.
#pragma once

#include "driver.h"

namespace standin {

int threads_per_multiprocessor(int capability);
int shared_per_block_optin(int capability);

// Takes an allocation away; `tell` the GPU process unless it is gone. Gives the next one.
std::map<uint64_t, Allocation>::iterator release_memory(
    Driver& driver, std::map<uint64_t, Allocation>::iterator allocation, bool tell);

}  // namespace standin
