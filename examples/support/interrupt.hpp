// Handling of Ctrl-C that lets a program finish its current step.
#pragma once

#include <csignal>

namespace examples {

namespace detail {

inline volatile std::sig_atomic_t interrupted_by = 0;

extern "C" inline void note_interrupt(int signal) {
  interrupted_by = signal;
  // A second signal ends the program at once.
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

}  // namespace detail

/// While one of these lives, the first SIGINT (Ctrl-C) or SIGTERM is only noted; a second one ends the program at once.
/// One lives at a time.
class InterruptGuard {
 public:
  InterruptGuard() {
    detail::interrupted_by = 0;
    interrupt_ = std::signal(SIGINT, detail::note_interrupt);
    terminate_ = std::signal(SIGTERM, detail::note_interrupt);
    // A signal that the parent process set to be ignored (nohup, a shell's background job) stays ignored.
    if (interrupt_ == SIG_IGN) std::signal(SIGINT, SIG_IGN);
    if (terminate_ == SIG_IGN) std::signal(SIGTERM, SIG_IGN);
  }
  ~InterruptGuard() {
    std::signal(SIGINT, interrupt_ == SIG_ERR ? SIG_DFL : interrupt_);
    std::signal(SIGTERM, terminate_ == SIG_ERR ? SIG_DFL : terminate_);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  /// The signal that has come, 0 if none has.
  int signal() const { return detail::interrupted_by; }

 private:
  void (*interrupt_)(int);
  void (*terminate_)(int);
};

}  // namespace examples
