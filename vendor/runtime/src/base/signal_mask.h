// Which threads of a process get its signals: never those that the runtime starts.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace qi {

// Threads started meanwhile leave signals to the program's own threads, but for their own faults.
class FaultSignalsOnly {
  public:
    FaultSignalsOnly() {
        sigset_t blocked;
        sigfillset(&blocked);
        for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT})
            sigdelset(&blocked, fault);
        pthread_sigmask(SIG_SETMASK, &blocked, &before_);
    }
    ~FaultSignalsOnly() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    FaultSignalsOnly(const FaultSignalsOnly&) = delete;
    FaultSignalsOnly& operator=(const FaultSignalsOnly&) = delete;

  private:
    sigset_t before_;
};

}  // namespace qi
