// Stacks that take turns on one thread: a switch saves the registers the calling convention keeps
// and costs a few nanoseconds (ucontext's would cost a system call).
#pragma once

#include <cstddef>

namespace standin {

// Saves where we are at *from and goes on at `to`.
extern "C" void standin_switch(void** from, void* to);

// What to switch to so that entry() runs on the stack that ends at `top`; it must not return.
void* fresh_fiber(std::byte* top, void (*entry)());

}  // namespace standin
