#include "gpu_link.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <filesystem>

#include "driver.h"

extern char** environ;

namespace standin {
namespace {

void* map_at(uint64_t address, uint64_t bytes, int flags, int fd) {
    void* wanted = reinterpret_cast<void*>(address);
    void* got = mmap(wanted, bytes, PROT_NONE, flags | MAP_FIXED_NOREPLACE | MAP_NORESERVE, fd, 0);
    if (got == MAP_FAILED) return nullptr;
    if (got == wanted) return got;
    munmap(got, bytes);
    return nullptr;
}

std::string helper_program() {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&helper_program), &info);
    return std::filesystem::canonical(info.dli_fname).parent_path() / "standin-gpu";
}

}  // namespace

void GpuLink::start(uint64_t device_bytes, uint64_t arena_bytes) {
    places_.device_bytes = device_bytes;
    places_.arena_bytes = arena_bytes;
    places_.parent = static_cast<uint64_t>(getpid());
    // Free of everything in ordinary processes, under the sanitizers' shadows, and in 39-bit space.
    for (const uint64_t base : {0x7e9000000000u, 0x200000000000u, 0x3000000000u}) {
        if (start_at(base)) return;
    }
    throw Failure{CUDA_ERROR_OPERATING_SYSTEM};
}

bool GpuLink::start_at(uint64_t base) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return false;
    arena_file_ = memfd_create("standin-arena", MFD_CLOEXEC);
    if (arena_file_ < 0 || ftruncate(arena_file_, static_cast<off_t>(places_.arena_bytes)) != 0) {
        close(ends[0]);
        close(ends[1]);
        return false;
    }
    places_.arena = base;
    places_.device = base + places_.arena_bytes;
    void* arena = map_at(places_.arena, places_.arena_bytes, MAP_SHARED, arena_file_);
    void* device = map_at(places_.device, places_.device_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    bool ok = arena && device && mprotect(arena, control_bytes, PROT_READ | PROT_WRITE) == 0;
    if (ok) {
        const std::string program = helper_program();
        std::vector<std::string> words = {program};
        for (const uint64_t v : {places_.arena, places_.arena_bytes, places_.device,
                                 places_.device_bytes, places_.parent})
            words.push_back(std::to_string(v));
        std::vector<char*> arguments;
        for (std::string& word : words)
            arguments.push_back(word.data());
        arguments.push_back(nullptr);
        // By way of high numbers, so that neither is overwritten before it is moved.
        const int socket_high = fcntl(ends[1], F_DUPFD_CLOEXEC, 100);
        const int arena_high = fcntl(arena_file_, F_DUPFD_CLOEXEC, 100);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_adddup2(&actions, socket_high, socket_fd);
        posix_spawn_file_actions_adddup2(&actions, arena_high, arena_fd);
        ok = posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments.data(), environ) == 0;
        posix_spawn_file_actions_destroy(&actions);
        close(socket_high);
        close(arena_high);
    }
    close(ends[1]);
    socket_ = ends[0];
    if (ok) {
        auto* control = static_cast<Control*>(arena);
        while (control->ready.load() == 0) {
            const timespec nap = {0, 50000000};
            syscall(SYS_futex, &control->ready, FUTEX_WAIT, 0, &nap, nullptr, 0);
            pollfd end = {socket_, POLLIN, 0};
            if (poll(&end, 1, 0) > 0 && control->ready.load() == 0) break;  // it ended
        }
        ok = control->ready.load() == 1;
        if (ok) control_ = control;
    }
    if (!ok) {
        close(socket_);
        close(arena_file_);
        if (arena) munmap(arena, places_.arena_bytes);
        if (device) munmap(device, places_.device_bytes);
        if (pid_ > 0) waitpid(pid_, nullptr, 0);
        pid_ = -1;
    }
    return ok;
}

CUresult GpuLink::error() {
    if (!control_) return CUDA_SUCCESS;
    if (const uint32_t code = control_->error.load()) return static_cast<CUresult>(code);
    pollfd end = {socket_, POLLIN, 0};
    if (poll(&end, 1, 0) > 0 && (end.revents & (POLLHUP | POLLERR))) {
        // It may have left its reason after we looked.
        uint32_t none = 0;
        control_->error.compare_exchange_strong(none, CUDA_ERROR_UNKNOWN);
        return static_cast<CUresult>(control_->error.load());
    }
    return CUDA_SUCCESS;
}

std::string GpuLink::report() const {
    if (!control_ || control_->error.load() == 0) return "";
    return control_->report[0] ? control_->report : "the GPU process is gone";
}

void GpuLink::kill() {
    if (pid_ > 0) {
        ::kill(pid_, SIGKILL);
        waitpid(pid_, nullptr, 0);
        pid_ = -1;
    }
}

void GpuLink::send_bytes(const void* data, size_t n) {
    const auto* at = static_cast<const char*>(data);
    while (n != 0) {
        const ssize_t sent = ::send(socket_, at, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) {
            const CUresult code = error();
            throw Failure{code ? code : CUDA_ERROR_UNKNOWN};
        }
        at += sent;
        n -= static_cast<size_t>(sent);
    }
}

void GpuLink::receive_bytes(void* to, size_t n) {
    auto* at = static_cast<char*>(to);
    while (n != 0) {
        const ssize_t got = recv(socket_, at, n, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            const CUresult code = error();
            throw Failure{code ? code : CUDA_ERROR_UNKNOWN};
        }
        at += got;
        n -= static_cast<size_t>(got);
    }
}

void GpuLink::send(Kind kind, uint32_t stream, uint64_t sequence,
                   std::initializer_list<Part> parts) {
    Header header{kind, stream, sequence, 0};
    for (const Part& part : parts)
        header.size += part.bytes;
    send_bytes(&header, sizeof header);
    for (const Part& part : parts)
        send_bytes(part.data, part.bytes);
}

LoadedModule GpuLink::load_module(std::span<const std::byte> image) {
    send(Kind::load_module, 0, 0, {{image.data(), image.size()}});
    ModuleReply head;
    uint64_t bytes;
    receive_bytes(&head, sizeof head);
    receive_bytes(&bytes, sizeof bytes);
    std::vector<char> rest(bytes);
    receive_bytes(rest.data(), bytes);
    LoadedModule module;
    module.id = head.id;
    const char* at = rest.data();
    for (uint32_t i = 0; i < head.n_kernels; i++) {
        KernelInfo& kernel = module.kernels.emplace_back();
        std::copy_n(at, sizeof kernel.reply, reinterpret_cast<char*>(&kernel.reply));
        at += sizeof kernel.reply;
        kernel.name.assign(at, kernel.reply.name_bytes);
        at += kernel.reply.name_bytes;
    }
    module.text.assign(at, head.text_bytes);
    return module;
}

CUresult GpuLink::wait(uint32_t stream, uint64_t sequence) {
    for (;;) {
        const uint32_t changes = control_->changes.load();
        if (done(stream, sequence)) return CUDA_SUCCESS;
        if (const CUresult code = error()) return code;
        const timespec nap = {0, 50000000};
        syscall(SYS_futex, &control_->changes, FUTEX_WAIT, changes, &nap, nullptr, 0);
    }
}

}  // namespace standin
