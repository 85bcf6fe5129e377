#include "cuda/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simsd::emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 192 * 1024;  // red zones make frames large
#else
constexpr size_t STACK_BYTES = 96 * 1024;
#endif

}  // namespace

#if defined(__x86_64__)
// Saves what a function must keep on the old stack, its address in *save, and takes the same from the new one.
extern "C" void simsd_switch_stack(void** save, void* load);
asm(R"(
.text
.globl simsd_switch_stack
.hidden simsd_switch_stack
.type simsd_switch_stack, @function
simsd_switch_stack:
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
.size simsd_switch_stack, .-simsd_switch_stack
)");
#endif

Fibers::~Fibers() {
    for (Context& context : contexts_) {
        munmap(context.stack, STACK_BYTES);
#if !defined(__x86_64__)
        delete static_cast<ucontext_t*>(context.pointer);
#endif
    }
#if !defined(__x86_64__)
    delete static_cast<ucontext_t*>(main_.pointer);
#endif
}

void Fibers::prepare(Context& context) {
    if (context.stack == nullptr) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        context.stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (context.stack == MAP_FAILED) throw std::bad_alloc();
        context.bottom = context.stack;
        context.size = STACK_BYTES;
    }
    context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    // The frames that the last run left here never returned, so their red zones are still in place.
    ASAN_UNPOISON_MEMORY_REGION(context.stack, STACK_BYTES);
#endif
#if defined(__x86_64__)
    // What simsd_switch_stack pops: six registers, then the address to return to. On entry to a function the stack
    // pointer is 8 past a multiple of 16, as a call leaves it.
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(context.stack) + STACK_BYTES) - 1;
    *top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry_);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context.pointer = top;
#else
    if (context.pointer == nullptr) context.pointer = new ucontext_t;
    auto* machine = static_cast<ucontext_t*>(context.pointer);
    getcontext(machine);
    machine->uc_stack.ss_sp = context.stack;
    machine->uc_stack.ss_size = STACK_BYTES;
    machine->uc_link = nullptr;
    makecontext(machine, entry_, 0);
#endif
}

void Fibers::reset(int count) {
    if (static_cast<int>(contexts_.size()) < count) contexts_.resize(count);
    for (int i = 0; i < count; ++i) prepare(contexts_[i]);
#if !defined(__x86_64__)
    if (main_.pointer == nullptr) main_.pointer = new ucontext_t;
#endif
}

void Fibers::switch_to(int fiber) {
    if (fiber == current_) return;
    Context &from = context(current_), &to = context(fiber);
    previous_ = current_;
    current_ = fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
    simsd_switch_stack(&from.pointer, to.pointer);
#else
    swapcontext(static_cast<ucontext_t*>(from.pointer), static_cast<ucontext_t*>(to.pointer));
#endif
#if defined(__SANITIZE_ADDRESS__)
    Context& left = context(previous_);
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
    left.bottom = bottom;
    left.size = size;
#endif
}

void Fibers::arrived() {
#if defined(__SANITIZE_ADDRESS__)
    Context& left = context(previous_);
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    left.bottom = bottom;
    left.size = size;
#endif
}

}  // namespace simsd::emulation
