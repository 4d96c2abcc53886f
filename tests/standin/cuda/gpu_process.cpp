// The GPU process: owns device memory and modules, receives the host process's messages in order
// and gives operations to the streams. It ends when the host process does, or when a kernel goes
// wrong.
#include <dlfcn.h>
#include <link.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_types.h"
#include "executor.h"
#include "gpu_streams.h"
#include "protocol.h"
#include "symbols.h"

namespace standin {
namespace {

Control* control;
Places places;

void* map_at(uint64_t address, uint64_t bytes, int protection, int flags, int fd) {
    void* wanted = reinterpret_cast<void*>(address);
    void* got = mmap(wanted, bytes, protection, flags | MAP_FIXED_NOREPLACE | MAP_NORESERVE, fd, 0);
    if (got != MAP_FAILED && got != wanted) {
        munmap(got, bytes);
        return nullptr;
    }
    return got == MAP_FAILED ? nullptr : got;
}

void wake_host() {
    control->changes.fetch_add(1);
    syscall(SYS_futex, &control->changes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Which allocations there were, so that a stray access can be named.
struct Allocation {
    uint64_t bytes;
    bool freed;
};
std::map<uint64_t, Allocation> allocations;
std::mutex allocations_mutex;

std::string describe_address(uint64_t address) {
    char text[160];
    if (address >= places.device && address < places.device + places.device_bytes) {
        std::unique_lock lock(allocations_mutex, std::try_to_lock);
        if (lock) {
            auto after = allocations.upper_bound(address);
            if (after != allocations.begin()) {
                const auto& [start, allocation] = *std::prev(after);
                const uint64_t offset = address - start;
                if (allocation.freed && offset < allocation.bytes) {
                    snprintf(text, sizeof text, "byte %llu of freed device memory of %llu bytes",
                             static_cast<unsigned long long>(offset),
                             static_cast<unsigned long long>(allocation.bytes));
                } else {
                    snprintf(text, sizeof text, "%llu bytes behind the start of %llu bytes",
                             static_cast<unsigned long long>(offset),
                             static_cast<unsigned long long>(allocation.bytes));
                }
                return text;
            }
        }
        return "device memory never allocated";
    }
    if (address >= places.arena && address < places.arena + places.arena_bytes)
        return "pinned host memory outside of every allocation";
    snprintf(text, sizeof text, "address %#llx, which is not of the device",
             static_cast<unsigned long long>(address));
    return text;
}

void on_fault(int signal, siginfo_t* info, void*) {
    switch (signal) {
        case SIGSEGV:
        case SIGBUS:
            if (below_stacks(reinterpret_cast<uint64_t>(info->si_addr)))
                fail(CUDA_ERROR_LAUNCH_FAILED,
                     "a thread needs more than the stand-in's 64 KiB of stack");
            fail(CUDA_ERROR_ILLEGAL_ADDRESS,
                 "illegal access: " + describe_address(reinterpret_cast<uint64_t>(info->si_addr)));
        case SIGILL:
            fail(CUDA_ERROR_ILLEGAL_INSTRUCTION, "illegal instruction");
        case SIGFPE:
            fail(CUDA_ERROR_LAUNCH_FAILED, "integer division by zero");
        default:
            fail(CUDA_ERROR_LAUNCH_FAILED, "the kernel aborted");
    }
}

void install_fault_handlers() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
        sigaction(signal, &action, nullptr);
    // Ctrl-C on the terminal is the host process's business.
    signal(SIGINT, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
}

// ---- messages ----

// False at the end of the connection.
bool receive(void* to, size_t n) {
    auto* at = static_cast<char*>(to);
    while (n != 0) {
        pollfd ready = {socket_fd, POLLIN, 0};
        const int count = poll(&ready, 1, 1000);
        // A forked child of the host process may hold the socket open after its death.
        if (getppid() != static_cast<pid_t>(places.parent)) return false;
        if (count <= 0) continue;
        const ssize_t got = recv(socket_fd, at, n, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        at += got;
        n -= static_cast<size_t>(got);
    }
    return true;
}

void reply(const void* data, size_t n) {
    const auto* at = static_cast<const char*>(data);
    while (n != 0) {
        const ssize_t sent = send(socket_fd, at, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) _exit(0);
        at += sent;
        n -= static_cast<size_t>(sent);
    }
}

template <class T>
T payload_as(const std::vector<std::byte>& payload) {
    T value;
    std::memcpy(&value, payload.data(), sizeof value);
    return value;
}

// ---- memory ----

// The allocation ends at a page without access, as nearly as its alignment allows.
uint64_t first_page(const Range& range) {
    return range.address / page * page;
}
uint64_t mapped_bytes(const Range& range) {
    return (range.address + range.bytes + page - 1) / page * page - first_page(range);
}

// New memory reads as 0xff everywhere: NaN, and integers far outside of anything. It is mapped from
// one small file of that, privately, so that real memory is taken only for what is written.
void allocate(const Range& range) {
    constexpr uint64_t pattern_bytes = 4 << 20;
    static const int pattern = [] {
        const int fd = memfd_create("poison", MFD_CLOEXEC);
        const std::vector<unsigned char> bytes(pattern_bytes, 0xff);
        if (fd < 0 || write(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
            fail(CUDA_ERROR_OPERATING_SYSTEM, "no memory for the pattern of new memory");
        return fd;
    }();
    const uint64_t start = first_page(range), bytes = mapped_bytes(range);
    for (uint64_t at = 0; at < bytes; at += pattern_bytes) {
        if (mmap(reinterpret_cast<void*>(start + at), std::min(pattern_bytes, bytes - at),
                 PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, pattern,
                 0) == MAP_FAILED)
            fail(CUDA_ERROR_OPERATING_SYSTEM, "device memory cannot be mapped");
    }
    std::lock_guard lock(allocations_mutex);
    allocations[range.address] = {range.bytes, false};
}

void release(const Range& range) {
    mmap(reinterpret_cast<void*>(first_page(range)), mapped_bytes(range), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    std::lock_guard lock(allocations_mutex);
    allocations[range.address].freed = true;
}

void protect(const Range& range, int protection) {
    if (mprotect(reinterpret_cast<void*>(range.address), range.bytes, protection) != 0)
        fail(CUDA_ERROR_OPERATING_SYSTEM, "pinned memory cannot be mapped");
}

// ---- modules ----

std::map<uint64_t, std::unique_ptr<Module>> modules;
std::mutex modules_mutex;
uint64_t next_module = 1;

void find_thread_local_block(Module& module) {
    link_map* map = nullptr;
    if (dlinfo(module.library, RTLD_DI_LINKMAP, &map) != 0) return;
    struct Search {
        ElfW(Addr) base;
        Module* module;
    } search = {map->l_addr, &module};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto* s = static_cast<Search*>(data);
            if (info->dlpi_addr != s->base) return 0;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
                s->module->tls_module = info->dlpi_tls_modid;
                s->module->tls_bytes = info->dlpi_phdr[i].p_memsz;
            }
            return 1;
        },
        &search);
}

void append(std::vector<std::byte>& to, const void* data, size_t n) {
    const auto* bytes = static_cast<const std::byte*>(data);
    to.insert(to.end(), bytes, bytes + n);
}

void load_module(const std::vector<std::byte>& image) {
    ModuleReply head{};
    std::vector<std::byte> rest;
    std::string text;
    auto module = std::make_unique<Module>();
    const int fd = memfd_create("module", MFD_CLOEXEC);
    if (fd < 0 || write(fd, image.data(), image.size()) != static_cast<ssize_t>(image.size())) {
        text = "no memory for a module";
    } else {
        const std::string path = "/proc/self/fd/" + std::to_string(fd);
        module->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!module->library) text = dlerror();
    }
    module->file = fd;
    if (module->library) {
        module->kernels =
            static_cast<const QiKernel*>(dlsym(module->library, "qi_standin_kernels"));
        if (!module->kernels) text = "the module has no table of kernels";
    }
    if (module->kernels) {
        find_thread_local_block(*module);
        const SharedSizes shared = shared_sizes(image);
        for (const QiKernel* k = module->kernels; k->name; k++) {
            KernelReply one{};
            one.name_bytes = static_cast<uint32_t>(std::strlen(k->name));
            one.n_parameters = static_cast<uint32_t>(k->n_parameters);
            one.max_threads = static_cast<uint32_t>(k->max_threads);
            one.packed_size = k->packed_size;
            one.static_shared = shared.of(k->name);
            for (int i = 0; i < k->n_parameters; i++) {
                one.sizes[i] = k->sizes[i];
                one.offsets[i] = k->offsets[i];
            }
            append(rest, &one, sizeof one);
            append(rest, k->name, one.name_bytes);
            head.n_kernels++;
        }
        std::lock_guard lock(modules_mutex);
        head.id = module->id = next_module++;
        modules[module->id] = std::move(module);
    }
    head.text_bytes = static_cast<uint32_t>(text.size());
    append(rest, text.data(), text.size());
    reply(&head, sizeof head);
    const uint64_t bytes = rest.size();
    reply(&bytes, sizeof bytes);
    reply(rest.data(), rest.size());
}

void unload_module(uint64_t id) {
    std::lock_guard lock(modules_mutex);
    modules.erase(id);
}

void serve() {
    Streams streams(*control, wake_host);
    Header header;
    std::thread([&] { streams.watch(); }).detach();
    while (receive(&header, sizeof header)) {
        std::vector<std::byte> payload(header.size);
        if (!receive(payload.data(), payload.size())) break;
        switch (header.kind) {
            case Kind::allocate:
                allocate(payload_as<Range>(payload));
                break;
            case Kind::release:
                release(payload_as<Range>(payload));
                break;
            case Kind::open:
                protect(payload_as<Range>(payload), PROT_READ | PROT_WRITE);
                break;
            case Kind::close:
                protect(payload_as<Range>(payload), PROT_NONE);
                break;
            case Kind::load_module:
                load_module(payload);
                break;
            case Kind::unload_module:
                unload_module(payload_as<uint64_t>(payload));
                break;
            case Kind::configure:
                streams.configure(payload_as<Configuration>(payload));
                break;
            default:
                streams.submit(header, std::move(payload));
                break;
        }
    }
    _exit(0);
}

bool start(char** arguments) {
    rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;  // each module holds one
    setrlimit(RLIMIT_NOFILE, &files);
    syscall(SYS_close_range, arena_fd + 1, ~0u, 0);  // the host process's files are not ours
    uint64_t* fields[] = {&places.arena, &places.arena_bytes, &places.device, &places.device_bytes,
                          &places.parent};
    for (uint64_t* field : fields)
        *field = std::strtoull(*arguments++, nullptr, 10);
    control = static_cast<Control*>(
        map_at(places.arena, places.arena_bytes, PROT_NONE, MAP_SHARED, arena_fd));
    if (!control || mprotect(control, control_bytes, PROT_READ | PROT_WRITE) != 0) return false;
    const bool mapped = map_at(places.device, places.device_bytes, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1) != nullptr;
    control->ready.store(mapped ? 1 : 2);
    syscall(SYS_futex, &control->ready, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    return mapped;
}

}  // namespace

const Module& module_by_id(uint64_t id) {
    std::lock_guard lock(modules_mutex);
    auto found = modules.find(id);
    if (found == modules.end())
        fail(CUDA_ERROR_LAUNCH_FAILED, "a kernel's module was unloaded before it ran");
    return *found->second;
}

void fail(uint32_t code, const std::string& what) {
    static std::mutex once;
    once.lock();  // for good: the first report is the one that counts
    const std::string where = whereabouts();
    const std::string text = where.empty() ? what : where + ": " + what;
    snprintf(control->report, sizeof control->report, "%s", text.c_str());
    fprintf(stderr, "stand-in GPU: %s\n", text.c_str());
    control->error.store(code);
    wake_host();
    _exit(1);
}

}  // namespace standin

int main(int argc, char** argv) {
    if (argc != 6) {
        fprintf(stderr, "%s is started by the stand-in's libcuda.so.1\n", argv[0]);
        return 2;
    }
    if (!standin::start(argv + 1)) return 1;
    standin::install_fault_handlers();
    standin::serve();
}
