// The host process's end of the link to the GPU process: starts it, sends messages, waits for
// streams.
#pragma once

#include <sys/types.h>
#include <initializer_list>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "protocol.h"

namespace standin {

struct Part {
    const void* data;
    size_t bytes;
};

struct KernelInfo {
    std::string name;
    KernelReply reply;
};

struct LoadedModule {
    uint64_t id = 0;  // 0: not loaded
    std::vector<KernelInfo> kernels;
    std::string text;
};

class GpuLink {
  public:
    // Throws Failure when no GPU process can be had.
    void start(uint64_t device_bytes, uint64_t arena_bytes);
    bool started() const { return control_ != nullptr; }

    // CUDA_SUCCESS while the GPU process is well. Looks at the process, not only at its word.
    CUresult error();
    std::string report() const;
    void kill();
    pid_t process() const { return pid_; }

    // Throws Failure with the sticky error when the GPU process is gone.
    void send(Kind kind, uint32_t stream, uint64_t sequence, std::initializer_list<Part> parts);
    LoadedModule load_module(std::span<const std::byte> image);

    bool done(uint32_t stream, uint64_t sequence) const {
        return control_->done[stream].load() >= sequence;
    }
    uint64_t last_done(uint32_t stream) const { return control_->done[stream].load(); }
    uint64_t event_time(uint64_t slot) const { return control_->event_time[slot].load(); }
    // Blocks; the caller holds no lock.
    CUresult wait(uint32_t stream, uint64_t sequence);

    uint64_t device_base() const { return places_.device; }
    uint64_t device_bytes() const { return places_.device_bytes; }
    std::byte* arena() const { return reinterpret_cast<std::byte*>(places_.arena); }
    uint64_t arena_bytes() const { return places_.arena_bytes; }
    int arena_file() const { return arena_file_; }

  private:
    bool start_at(uint64_t base);
    void send_bytes(const void* data, size_t n);
    void receive_bytes(void* to, size_t n);

    Control* control_ = nullptr;
    Places places_{};
    int socket_ = -1;
    int arena_file_ = -1;
    pid_t pid_ = -1;
};

}  // namespace standin
