// Fibers: functions that can be left in the middle and gone on with, each on a stack of its own, all on one OS thread.
//
// The sanitizers are told of every switch, if they are there: the functions they offer for it are weak here, so this
// is compiled once for all. On x86-64 the switch is written out: swapcontext asks the kernel for the signal mask each
// time, and 1000 blocks of 64 threads with 6 rendezvous take 0.63 s in place of 0.05.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_set_fiber_name(void* fiber, const char* name);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace lanenorm::on_host {

// ---- What TSAN is told -------------------------------------------------------------------------------------------

inline bool under_asan() { return __asan_unpoison_memory_region != nullptr; }
inline bool under_tsan() { return __tsan_create_fiber != nullptr; }

// What happened before release(address) happened before what follows acquire(address).
inline void release(void* address) {
  if (under_tsan()) __tsan_release(address);
}
inline void acquire(void* address) {
  if (under_tsan()) __tsan_acquire(address);
}

// While one lives, what this fiber does to memory goes unnoticed. Memory allocated meanwhile starts without history.
class Unnoticed {
 public:
  Unnoticed() {
    if (!under_tsan()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unnoticed() {
    if (!under_tsan()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unnoticed(const Unnoticed&) = delete;
  Unnoticed& operator=(const Unnoticed&) = delete;
};

// ---- Stacks ------------------------------------------------------------------------------------------------------

// 128 KiB for a kernel built without optimization and with ASAN; what is not touched costs nothing.
inline constexpr std::size_t kStackBytes = std::size_t{128} << 10;
inline constexpr std::size_t kPage = 4096;

// Below every stack lies a page that cannot be touched.
class Stack {
 public:
  Stack() {
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    bottom_ = static_cast<unsigned char*>(memory) + kPage;
    mprotect(memory, kPage, PROT_NONE);
  }
  Stack(Stack&& other) noexcept : bottom_(other.bottom_) { other.bottom_ = nullptr; }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
    if (bottom_ != nullptr) munmap(bottom_ - kPage, kStackBytes + kPage);
  }
  unsigned char* bottom() const { return bottom_; }

 private:
  unsigned char* bottom_;
};

// ---- The switch --------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

// Saves the registers that a call preserves on this stack and the stack pointer in *from; goes on at `to`, where the
// same was done. MXCSR and the x87 control word are the same in all fibers.
extern "C" void lanenorm_on_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.type lanenorm_on_host_switch, @function
lanenorm_on_host_switch:
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
.size lanenorm_on_host_switch, . - lanenorm_on_host_switch
.popsection
)");

class Context {
 public:
  // entry() never returns. `skip`: bytes at the top left free, a multiple of 64.
  void prepare(const Stack& stack, std::size_t skip, void (*entry)()) {
    auto* top = reinterpret_cast<std::uint64_t*>(stack.bottom() + kStackBytes - skip);
    *--top = 0;  // entry's return address: the end for who walks the stack
    *--top = reinterpret_cast<std::uint64_t>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = 0;
    stack_pointer_ = top;
  }
  static void change(Context* from, Context* to) { lanenorm_on_host_switch(&from->stack_pointer_, to->stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(const Stack& stack, std::size_t skip, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = kStackBytes - skip;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context* from, Context* to) { swapcontext(&from->context_, &to->context_); }

 private:
  ucontext_t context_;
};

#endif

// ---- Fibers ------------------------------------------------------------------------------------------------------

// One that was started by start(), again and again maybe, or the code that switches to them. To TSAN it is one thread
// as long as the object lives.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (owned_) __tsan_destroy_fiber(tsan_);
  }

  // The calling code as a fiber.
  void adopt() {
    if (under_tsan()) tsan_ = __tsan_get_current_fiber();
  }

  // Stacks that many fibers touch at the same offset would all want the same few lines of L1: `color` spreads them.
  // `name` is what TSAN calls it.
  void start(const Stack& stack, unsigned color, void (*entry)(), const std::string& name) {
    bottom_ = stack.bottom();
    size_ = kStackBytes;
    fake_stack_ = nullptr;
    if (under_asan()) __asan_unpoison_memory_region(bottom_, size_);
    if (under_tsan()) {
      if (!owned_) tsan_ = __tsan_create_fiber(0);
      owned_ = true;
      __tsan_set_fiber_name(tsan_, name.c_str());
    }
    context_.prepare(stack, color % 32 * 64, entry);
  }

  // Leaves this fiber for `to`; returns when something switches back. `last`: nothing ever will.
  void switch_to(Fiber* to, bool last = false) {
    constexpr unsigned kNoOrder = 1;
    if (__sanitizer_start_switch_fiber != nullptr) {
      __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to->bottom_, to->size_);
    }
    to->from_ = this;
    if (under_tsan()) __tsan_switch_to_fiber(to->tsan_, kNoOrder);
    Context::change(&context_, &to->context_);
    arrived();
  }

  // To be called first in entry(); switch_to does it everywhere else.
  void arrived() {
    if (__sanitizer_finish_switch_fiber == nullptr) return;
    __sanitizer_finish_switch_fiber(fake_stack_, &from_->bottom_, &from_->size_);
  }

 private:
  Context context_;
  const void* bottom_ = nullptr;  // of the stack; for the adopted fiber, as ASAN tells when it is left
  std::size_t size_ = 0;
  void* fake_stack_ = nullptr;
  Fiber* from_ = nullptr;  // who switched here last
  void* tsan_ = nullptr;
  bool owned_ = false;
};

}  // namespace lanenorm::on_host
