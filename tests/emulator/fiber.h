// Fibers: stacks of their own, switched between in a few nanoseconds, and what the sanitizers must be told of that.
//
// Part of emulator.cpp, which is compiled without sanitizers and linked with or without: their runtimes are asked for
// at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifndef __x86_64__
#include <ucontext.h>
#endif

extern "C" {
#define NORMFUSED_WEAK __attribute__((weak))
NORMFUSED_WEAK void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
NORMFUSED_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
NORMFUSED_WEAK void __asan_poison_memory_region(const volatile void* address, size_t size);
NORMFUSED_WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
NORMFUSED_WEAK void* __tsan_get_current_fiber();
NORMFUSED_WEAK void* __tsan_create_fiber(unsigned flags);
NORMFUSED_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
NORMFUSED_WEAK void __tsan_acquire(void* address);
NORMFUSED_WEAK void __tsan_release(void* address);
NORMFUSED_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
NORMFUSED_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef NORMFUSED_WEAK
}

#ifdef __x86_64__
// Saves the registers that a call preserves on the stack, and that stack's pointer in *from; goes on where `to` did so.
extern "C" void normfused_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.local normfused_switch_stack
.type normfused_switch_stack, @function
normfused_switch_stack:
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
.size normfused_switch_stack, .-normfused_switch_stack
)");
#endif

namespace normfused::emulator {

// An odd number of cache lines, lest the hot ends of all stacks share a few cache sets.
constexpr size_t kStackBytes = (64 << 10) + 13 * 64;
constexpr uint64_t kStackCanary = 0x9e3779b97f4a7c15;

inline bool with_tsan() { return __tsan_create_fiber != nullptr; }
inline void acquire(void* token) {
  if (with_tsan()) __tsan_acquire(token);
}
inline void release(void* token) {
  if (with_tsan()) __tsan_release(token);
}
inline void poison_for_asan(void* address, size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, size);
}
inline void unpoison_for_asan(void* address, size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, size);
}

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  unsigned char* stack = nullptr;  // null: one that was not allocated here, but runs the program
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  void* asan_fake_stack = nullptr;
  void* tsan = nullptr;
};

#ifdef __x86_64__
inline void set_entry(Fiber* fiber, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(fiber->stack + kStackBytes / 16 * 16);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber->stack_pointer = top;
}

inline void switch_stack(Fiber* from, Fiber* to) { normfused_switch_stack(&from->stack_pointer, to->stack_pointer); }
#else
inline void set_entry(Fiber* fiber, void (*entry)()) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
}

inline void switch_stack(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
#endif

inline void allocate(Fiber* fiber) {
  fiber->stack = static_cast<unsigned char*>(std::aligned_alloc(64, kStackBytes));
  fiber->asan_bottom = fiber->stack;
  fiber->asan_size = kStackBytes;
  if (with_tsan()) fiber->tsan = __tsan_create_fiber(0);
}

// The next switch to the fiber calls entry().
inline void prepare(Fiber* fiber, void (*entry)()) {
  std::memcpy(fiber->stack, &kStackCanary, sizeof(kStackCanary));
  fiber->asan_fake_stack = nullptr;
  set_entry(fiber, entry);
}

inline bool overflowed(const Fiber& fiber) {
  return std::memcmp(fiber.stack, &kStackCanary, sizeof(kStackCanary)) != 0;
}

inline Fiber* left_fiber = nullptr;  // by the last switch
inline char switch_token;            // to acquire it is to come after all that was done before any switch

// The first thing to be done on a fiber that was switched to.
__forceinline__ void finish_switch(Fiber* self) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self->asan_fake_stack, &left_fiber->asan_bottom, &left_fiber->asan_size);
  }
}

// Returns when another fiber switches back; for_good: never.
__forceinline__ void switch_fiber(Fiber* from, Fiber* to, bool for_good = false) {
  left_fiber = from;
  release(&switch_token);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from->asan_fake_stack, to->asan_bottom, to->asan_size);
  }
  if (with_tsan()) __tsan_switch_to_fiber(to->tsan, /*no synchronisation*/ 1);
  switch_stack(from, to);
  finish_switch(from);
}

}  // namespace normfused::emulator
