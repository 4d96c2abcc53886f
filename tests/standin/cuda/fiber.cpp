#include "fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
asm(R"(
.text
.globl standin_switch
.type standin_switch,@function
standin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size standin_switch,.-standin_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl standin_switch
.type standin_switch,%function
standin_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size standin_switch,.-standin_switch
)");
#else
#error "fibers are written for x86-64 and aarch64"
#endif

namespace standin {

void* fresh_fiber(std::byte* top, void (*entry)()) {
#if defined(__x86_64__)
    constexpr size_t saved = 6 * 8;  // registers below the return address
    constexpr size_t entry_at = saved;
    constexpr size_t frame = saved + 16;  // entry() finds the stack as after a call
#else
    constexpr size_t frame = 160;
    constexpr size_t entry_at = 88;  // x30
#endif
    std::byte* sp = top - frame;
    std::memset(sp, 0, frame);
    std::memcpy(sp + entry_at, &entry, sizeof entry);
    return sp;
}

}  // namespace standin
