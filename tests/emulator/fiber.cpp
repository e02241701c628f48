// Fibers: stacks, and the switch between them.
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#define EMU_UCONTEXT
#endif

enum : size_t { STACK = EMU_STACK, GUARD = 4096 };

static void *launching; // context of emu_launch_blocks
static char *stack_low, *stack_high;

// ---- the switch. It saves the running context, whose address goes to *save, and resumes another.
#ifdef EMU_UCONTEXT
#include <ucontext.h>
static void switch_context(void **save, void *to) {
    ucontext_t here; // lives on the parked stack
    *save = &here;
    swapcontext(&here, (ucontext_t *)to);
}
#else
extern "C" void emu_switch_context(void **save, void *to) __attribute__((visibility("hidden")));
// Callee-saved registers go on the old stack; stacks change; they come from the new one.
asm(R"(
.text
.globl emu_switch_context
.hidden emu_switch_context
.type emu_switch_context,@function
emu_switch_context:
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
.size emu_switch_context,.-emu_switch_context
.section .note.GNU-stack,"",@progbits
.text
)");
static inline void switch_context(void **save, void *to) {
    emu_switch_context(save, to);
}
#endif

#ifdef EMU_ASAN
static const void *launching_bottom;
static size_t launching_size;
#endif

void emu_fiber_switch(emu_fiber *from, emu_fiber *to) {
    void *unused, **save = from ? &from->context : emu_self ? &unused : &launching;
    void *target = to ? to->context : launching;
    const bool ends = from ? from->done : emu_self != NULL;
    emu_counts.switches++;
    emu_self = to;
#ifdef EMU_ASAN
    void *fake = NULL;
    __sanitizer_start_switch_fiber(ends ? NULL : &fake, to ? to->stack : launching_bottom,
                                   to ? (size_t)STACK : launching_size);
    switch_context(save, target);
    __sanitizer_finish_switch_fiber(fake, NULL, NULL);
#else
    (void)ends;
    switch_context(save, target);
#endif
}

// ---- the first function of a fiber
static void (*fiber_entry)();

static void fiber_main() {
#ifdef EMU_ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    if (!launching_size) { // the first fiber of a launch comes from there
        launching_bottom = bottom;
        launching_size = size;
    }
#endif
    fiber_entry();
    abort();
}

void emu_fiber_launch_begins() {
#ifdef EMU_ASAN
    launching_size = 0;
#endif
}

void emu_fiber_prepare(emu_fiber *f, void (*entry)()) {
    fiber_entry = entry;
    if (!f->stack) {
        f->stack = (char *)mmap(NULL, STACK, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(f->stack, GUARD, PROT_NONE); // an overflow faults
        stack_low = !stack_low || f->stack < stack_low ? f->stack : stack_low;
        stack_high = f->stack + STACK > stack_high ? f->stack + STACK : stack_high;
    }
#ifdef EMU_ASAN
    // Frames of a fiber that was abandoned, and the last ones of an exit, never returned.
    const size_t used = f->done ? 16384 : STACK - GUARD;
    __asan_unpoison_memory_region(f->stack + STACK - used, used);
#endif
#ifdef EMU_UCONTEXT
    if (!f->context_memory) {
        f->context_memory = malloc(sizeof(ucontext_t));
    }
    ucontext_t *context = (ucontext_t *)f->context_memory;
    getcontext(context);
    context->uc_stack.ss_sp = f->stack + GUARD;
    context->uc_stack.ss_size = STACK - GUARD;
    context->uc_link = NULL;
    makecontext(context, fiber_main, 0);
    f->context = context;
#else
    void **top = (void **)(f->stack + STACK) - 1; // as after a call: rsp + 8 is a multiple of 16
    *top = NULL;
    *--top = (void *)fiber_main;
    f->context = top - 6;
#endif
}

bool emu_on_a_stack(const void *p) {
    const char *at = (const char *)p;
    if (at >= stack_low && at < stack_high) {
        for (const emu_fiber *f : emu_b.fiber) {
            if (at >= f->stack && at < f->stack + STACK) {
                return true;
            }
        }
    }
    static const char *low, *high;
    static pthread_t owner;
    if (!low || !pthread_equal(owner, pthread_self())) {
        pthread_attr_t attributes;
        void *stack;
        size_t size;
        if (pthread_getattr_np(pthread_self(), &attributes)) {
            return false;
        }
        pthread_attr_getstack(&attributes, &stack, &size);
        pthread_attr_destroy(&attributes);
        low = (const char *)stack;
        high = low + size;
        owner = pthread_self();
    }
    return at >= low && at < high;
}
