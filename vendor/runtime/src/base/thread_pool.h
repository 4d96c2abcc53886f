// One pool of workers per process; parallel loops over chunks of work.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace qi {

// A non-owning reference to a callable: no allocation on the hot path.
template <typename Signature>
class FunctionRef;

template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
  public:
    template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>) FunctionRef(F&& callable)
        : object_(const_cast<void*>(static_cast<const void*>(&callable))),
          call_([](void* object, Args... args) -> R {
              return (*static_cast<std::remove_reference_t<F>*>(object))(
                  std::forward<Args>(args)...);
          }) {}
    R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

  private:
    void* object_;
    R (*call_)(void*, Args...);
};

// Calls body(chunk, worker) once for every chunk in [0, n_chunks), on at most n_threads threads,
// the caller among them; worker in [0, n_threads) tells the threads of one call apart. Returns when
// every chunk is done and its writes are visible. Chunks are taken one by one, so a descheduled
// worker delays one chunk, and the caller finishes alone if no worker shows up. Several threads may
// call at once. The body must not throw and must not call parallel_for.
void parallel_for(int n_threads, int64_t n_chunks,
                  FunctionRef<void(int64_t chunk, int worker)> body);

// While one lives, the next call of parallel_for is expected soon: workers that have come to a job
// stay awake for the next one, so that the caller does not have to wake them one after the other;
// not for more than some milliseconds, and not on cores that other threads want. For callers that
// wait, for fractions of a millisecond, for what they compute with. Any number may live at once, on
// any threads.
class StayAwake {
  public:
    StayAwake();
    ~StayAwake();
    StayAwake(const StayAwake&) = delete;
    StayAwake& operator=(const StayAwake&) = delete;
};

// How often a worker was asleep when it was invited, since the process began.
int64_t n_worker_wakes();

}  // namespace qi
