// Compiling kernels from the embedded source, for one architecture, without any CUDA header.
#include "device/cuda/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/sha256.h"
#include "device/cuda/cubin_cache.h"
#include "device/cuda/driver.h"
#include "device/cuda/embedded.h"
#include "device/cuda/libraries.h"

namespace qi::cuda {

namespace {

using nvrtcResult = int;
using nvrtcProgram = struct _nvrtcProgram*;

#define QI_NVRTC_ENTRIES(X)                                                                    \
    X(nvrtcVersion, (int* major, int* minor))                                                  \
    X(nvrtcCreateProgram, (nvrtcProgram*, const char* source, const char* name, int n_headers, \
                           const char* const* headers, const char* const* names))              \
    X(nvrtcDestroyProgram, (nvrtcProgram*))                                                    \
    X(nvrtcCompileProgram, (nvrtcProgram, int n_options, const char* const* options))          \
    X(nvrtcGetCUBINSize, (nvrtcProgram, size_t*))                                              \
    X(nvrtcGetCUBIN, (nvrtcProgram, char*))                                                    \
    X(nvrtcGetProgramLogSize, (nvrtcProgram, size_t*))                                         \
    X(nvrtcGetProgramLog, (nvrtcProgram, char*))

struct Nvrtc {
    NvrtcInfo info;
    const char* (*nvrtcGetErrorString)(nvrtcResult) = nullptr;
    nvrtcResult (*nvrtcGetNumSupportedArchs)(int*) = nullptr;
    nvrtcResult (*nvrtcGetSupportedArchs)(int*) = nullptr;
#define QI_NVRTC_MEMBER(name, parameters) nvrtcResult(*name) parameters = nullptr;
    QI_NVRTC_ENTRIES(QI_NVRTC_MEMBER)
#undef QI_NVRTC_MEMBER
};

template <typename F>
bool find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
}

Nvrtc load() {
    const ToolkitLibrary library =
        load_toolkit_library("nvrtc", {"libnvrtc-builtins.so.*"}, "compiles kernels for the GPU");
    Nvrtc nvrtc;
    nvrtc.info.path = library.path;
    const char* missing = nullptr;
#define QI_NVRTC_FIND(name, parameters) \
    if (!find(library.handle, #name, nvrtc.name) && missing == nullptr) missing = #name;
    QI_NVRTC_ENTRIES(QI_NVRTC_FIND)
#undef QI_NVRTC_FIND
    if (!find(library.handle, "nvrtcGetErrorString", nvrtc.nvrtcGetErrorString))
        missing = "nvrtcGetErrorString";
    if (missing != nullptr)
        fail(QI_DEVICE, "%s has no %s, so it is no NVRTC that qinfer can use: %s",
             library.path.c_str(), missing, install_line(driver().version));
    find(library.handle, "nvrtcGetNumSupportedArchs", nvrtc.nvrtcGetNumSupportedArchs);
    find(library.handle, "nvrtcGetSupportedArchs", nvrtc.nvrtcGetSupportedArchs);
    if (nvrtc.nvrtcVersion(&nvrtc.info.major, &nvrtc.info.minor) != 0)
        fail(QI_DEVICE, "%s does not tell its version", library.path.c_str());
    return nvrtc;
}

// Kept once found; a search that failed is made again, for it may have been configured since.
const Nvrtc& nvrtc() {
    static std::mutex& mutex = *new std::mutex;
    static const Nvrtc* found = nullptr;
    driver();  // refuses a fork before the mutex is touched
    std::lock_guard lock(mutex);
    if (found == nullptr) found = new Nvrtc(load());
    return *found;
}

struct UnitParts {
    std::string source;
    std::vector<std::string> definitions;
};

UnitParts parts_of(std::string_view unit) {
    std::vector<std::string> words;
    while (true) {
        const size_t begin = unit.find_first_not_of(' ');
        if (begin == std::string_view::npos) break;
        const size_t end = std::min(unit.find(' ', begin), unit.size());
        words.emplace_back(unit.substr(begin, end - begin));
        unit.remove_prefix(end);
    }
    if (words.empty()) fail(QI_INTERNAL, "a kernel unit without a name");
    UnitParts parts;
    parts.source = words.front();
    parts.definitions.assign(words.begin() + 1, words.end());
    return parts;
}

// The architecture to compile for: the card's, or the newest before it that this NVRTC knows and
// whose code runs on the card, which is so within one major version.
int target_for(const Nvrtc& nvrtc, int architecture) {
    int n = 0;
    if (nvrtc.nvrtcGetNumSupportedArchs == nullptr || nvrtc.nvrtcGetSupportedArchs == nullptr ||
        nvrtc.nvrtcGetNumSupportedArchs(&n) != 0 || n <= 0)
        return architecture;
    std::vector<int> known(size_t(n), 0);
    if (nvrtc.nvrtcGetSupportedArchs(known.data()) != 0) return architecture;
    int best = 0;
    for (const int candidate : known) {
        if (candidate / 10 == architecture / 10 && candidate <= architecture)
            best = std::max(best, candidate);
    }
    if (best == 0)
        fail(QI_DEVICE,
             "NVRTC %d.%d (%s) cannot compile for this GPU, which is sm_%d: install a newer one "
             "with %s",
             nvrtc.info.major, nvrtc.info.minor, nvrtc.info.path.c_str(), architecture,
             install_line(driver().version));
    return best;
}

std::vector<std::string> options_for(const UnitParts& parts, int target) {
    // Fused multiply-adds are written by hand, so that every instance of a kernel rounds alike.
    std::vector<std::string> options = {format("--gpu-architecture=sm_%d", target), "--std=c++17",
                                        "-default-device", "--fmad=false"};
    for (const std::string& definition : parts.definitions)
        options.push_back("-D" + definition);
    return options;
}

Sha256 key_of(const Nvrtc& nvrtc, const UnitParts& parts, const std::vector<std::string>& options) {
    Sha256Stream stream;
    // Each part with its length, so that nothing slides from one into the next.
    const auto add = [&](std::string_view text) {
        const uint64_t length = text.size();
        stream.update(std::as_bytes(std::span(&length, 1)));
        stream.update(text);
    };
    add(format("NVRTC %d.%d", nvrtc.info.major, nvrtc.info.minor));
    for (const std::string& option : options)
        add(option);
    add(parts.source);
    add(kernel_source(parts.source));
    for (const KernelSource& source : kernel_sources()) {
        if (!source.name.ends_with(".cuh")) continue;
        add(source.name);
        add(source.text);
    }
    return stream.finish();
}

std::string first_lines(const std::string& log) {
    constexpr size_t max_lines = 6;
    size_t end = 0;
    for (size_t i = 0; i < max_lines && end < log.size(); i++)
        end = std::min(log.find('\n', end), log.size() - 1) + 1;
    return log.substr(0, end);
}

class Program {
  public:
    Program(const Nvrtc& nvrtc, const std::string& name) : nvrtc_(nvrtc) {
        std::vector<const char*> headers;
        std::vector<const char*> names;
        for (const KernelSource& source : kernel_sources()) {
            if (!source.name.ends_with(".cuh")) continue;
            headers.push_back(source.text.data());
            names.push_back(source.name.data());
        }
        const nvrtcResult result =
            nvrtc.nvrtcCreateProgram(&program_, kernel_source(name).data(), name.c_str(),
                                     int(headers.size()), headers.data(), names.data());
        if (result != 0) fail_with(result, name);
    }
    ~Program() {
        if (program_ != nullptr) nvrtc_.nvrtcDestroyProgram(&program_);
    }
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    std::vector<std::byte> compile(const std::vector<std::string>& options,
                                   const std::string& unit) {
        std::vector<const char*> pointers;
        for (const std::string& option : options)
            pointers.push_back(option.c_str());
        const nvrtcResult result =
            nvrtc_.nvrtcCompileProgram(program_, int(pointers.size()), pointers.data());
        if (result != 0) fail_with(result, unit);
        size_t n_bytes = 0;
        nvrtcResult got = nvrtc_.nvrtcGetCUBINSize(program_, &n_bytes);
        if (got != 0) fail_with(got, unit);
        std::vector<std::byte> cubin(n_bytes);
        got = nvrtc_.nvrtcGetCUBIN(program_, reinterpret_cast<char*>(cubin.data()));
        if (got != 0) fail_with(got, unit);
        return cubin;
    }

  private:
    std::string log_text() {
        size_t n_bytes = 0;
        if (program_ == nullptr || nvrtc_.nvrtcGetProgramLogSize(program_, &n_bytes) != 0 ||
            n_bytes <= 1)
            return "";
        std::string text(n_bytes, '\0');
        if (nvrtc_.nvrtcGetProgramLog(program_, text.data()) != 0) return "";
        text.resize(n_bytes - 1);
        return text;
    }

    [[noreturn]] void fail_with(nvrtcResult result, const std::string& unit) {
        const std::string log = first_lines(log_text());
        const char* text = nvrtc_.nvrtcGetErrorString(result);
        fail(QI_DEVICE, "NVRTC %d.%d (%s) does not compile '%s': %s%s%s", nvrtc_.info.major,
             nvrtc_.info.minor, nvrtc_.info.path.c_str(), unit.c_str(),
             text ? text : format("error %d", result).c_str(), log.empty() ? "" : "\n",
             log.c_str());
    }

    const Nvrtc& nvrtc_;
    nvrtcProgram program_ = nullptr;
};

// The embedded cubin that runs on the card and was made for the nearest architecture.
const EmbeddedCubin* embedded_cubin(std::string_view unit, int architecture) {
    const EmbeddedCubin* best = nullptr;
    for (const EmbeddedCubin& cubin : embedded_cubins()) {
        if (cubin.unit != unit || cubin.architecture / 10 != architecture / 10 ||
            cubin.architecture > architecture)
            continue;
        if (best == nullptr || best->architecture < cubin.architecture) best = &cubin;
    }
    return best;
}

}  // namespace

const NvrtcInfo& nvrtc_info() {
    return nvrtc().info;
}

Cubin make_cubin(std::string_view unit, int architecture, Cubin::Origin from) {
    const UnitParts parts = parts_of(unit);
    if (from == Cubin::Origin::embedded) {
        if (const EmbeddedCubin* found = embedded_cubin(unit, architecture))
            return {{found->bytes.begin(), found->bytes.end()}, Cubin::Origin::embedded, 0};
    }
    const Nvrtc& compiler = nvrtc();
    const std::vector<std::string> options = options_for(parts, target_for(compiler, architecture));
    const Sha256 key = key_of(compiler, parts, options);
    const std::string folder = configuration().cache_folder;
    if (from != Cubin::Origin::compiled && !folder.empty()) {
        std::vector<std::byte> cubin = read_cached_cubin(folder, key);
        if (!cubin.empty()) return {std::move(cubin), Cubin::Origin::cached, 0};
    }
    const auto begin = std::chrono::steady_clock::now();
    Cubin made;
    made.bytes = Program(compiler, parts.source).compile(options, std::string(unit));
    made.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    log(LogLevel::debug, format("compiled the kernels of '%s' for sm_%d in %.2f s",
                                std::string(unit).c_str(), architecture, made.seconds));
    if (!folder.empty()) write_cached_cubin(folder, key, made.bytes);
    return made;
}

}  // namespace qi::cuda
