// NVRTC's entry points: programs are compiled by the host compiler, with shim.h in front, into a
// shared object that takes the cubin's place; or, where STANDIN_NVRTC names a real NVRTC, by that
// to PTX, which is translated. Objects are cached on disk by what they are made from.
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "image.h"
#include "nvrtc_real.h"
#include "ptx_module.h"
#include "ptx_translate.h"
#include "source_scan.h"
#include "version.h"

extern char** environ;

#define NVRTC_API extern "C" __attribute__((visibility("default")))

enum nvrtcResult : int {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_OUT_OF_MEMORY = 1,
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11,
};
using nvrtcProgram = struct NvrtcProgram*;

namespace standin {
namespace {

namespace fs = std::filesystem;

struct Program {
    std::string name, source;
    std::map<std::string, std::string> headers;
    std::string log;
    std::vector<char> cubin;
};

std::mutex programs_mutex;
std::map<nvrtcProgram, std::unique_ptr<Program>> programs;

const int version_minor = cuda_major >= 13 ? 0 : 9;
const std::vector<int> architectures =
    cuda_major >= 13 ? std::vector{75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}
                     : std::vector{50, 52, 53, 60, 61,  62,  70,  72,  75, 80,
                                   86, 87, 89, 90, 100, 101, 103, 120, 121};

// Counts the call with the driver's, when the stand-in's driver is there, so that it can be told to
// fail.
nvrtcResult enter(const char* name) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (!driver) return NVRTC_SUCCESS;
    auto* count = reinterpret_cast<int (*)(const char*)>(dlsym(driver, "standin_enter"));
    const int code = count ? count(name) : 0;
    dlclose(driver);
    if (code == 0) return NVRTC_SUCCESS;
    return code == 2 ? NVRTC_ERROR_OUT_OF_MEMORY : NVRTC_ERROR_INTERNAL_ERROR;
}

fs::path own_folder() {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&own_folder), &info);
    return fs::canonical(info.dli_fname).parent_path();
}

std::string read_file(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

void write_file(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream out(path, std::ios::binary);
    out << text;
}

// ---- options ----

struct Options {
    int architecture = architectures[0];
    bool real = false;  // sm_XX, not compute_XX: there is a cubin
    std::string standard = "c++17";
    std::vector<std::string> definitions;
    std::vector<std::string> others;  // all words but the architecture
};

bool starts(const std::string& text, const char* with, std::string& rest) {
    if (text.rfind(with, 0) != 0) return false;
    rest = text.substr(std::strlen(with));
    return true;
}

// False, with the reason in the log, for what NVRTC would not take either.
bool parse_options(int n, const char* const* words, Options& options, std::string& log) {
    static const std::set<std::string> ignored = {"-default-device",
                                                  "--device-as-default-execution-space",
                                                  "-lineinfo",
                                                  "--generate-line-info",
                                                  "-G",
                                                  "--device-debug",
                                                  "-w",
                                                  "--disable-warnings",
                                                  "-use_fast_math",
                                                  "--use_fast_math",
                                                  "--restrict",
                                                  "-restrict",
                                                  "--extra-device-vectorization",
                                                  "-extra-device-vectorization",
                                                  "--minimal",
                                                  "-minimal"};
    static const char* const ignored_with_value[] = {
        "--fmad=",          "-fmad=",          "--ftz=",           "-ftz=",
        "--prec-div=",      "-prec-div=",      "--prec-sqrt=",     "-prec-sqrt=",
        "--ptxas-options=", "-Xptxas=",        "--maxrregcount=",  "-maxrregcount=",
        "--diag-suppress=", "-diag-suppress=", "--split-compile=", "-split-compile="};
    for (int i = 0; i < n; i++) {
        const std::string word = words[i] ? words[i] : "";
        std::string value;
        if (!starts(word, "--gpu-architecture=", value) && !starts(word, "-arch=", value))
            options.others.push_back(word);
        if (ignored.contains(word)) continue;
        if (std::any_of(std::begin(ignored_with_value), std::end(ignored_with_value),
                        [&](const char* o) { return starts(word, o, value) && !value.empty(); }))
            continue;
        if (starts(word, "--gpu-architecture=", value) || starts(word, "-arch=", value)) {
            std::string digits;
            options.real = starts(value, "sm_", digits);
            if (!options.real && !starts(value, "compute_", digits)) digits.clear();
            options.architecture = std::atoi(digits.c_str());
            if (std::find(std::begin(architectures), std::end(architectures),
                          options.architecture) == std::end(architectures) ||
                digits != std::to_string(options.architecture)) {
                log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
                return false;
            }
        } else if (starts(word, "--std=", value) || starts(word, "-std=", value)) {
            if (value != "c++14" && value != "c++17" && value != "c++20") {
                log = "nvrtc: error: invalid value for --std: " + value + "\n";
                return false;
            }
            options.standard = value;
        } else if ((starts(word, "-D", value) || starts(word, "--define-macro=", value)) &&
                   !value.empty()) {
            options.definitions.push_back("-D" + value);
        } else {
            log = "nvrtc: error: unrecognized option " + word + " found\n";
            return false;
        }
    }
    return true;
}

// ---- compiling ----

uint64_t hash_of(const std::vector<std::string>& texts) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const std::string& text : texts) {
        for (const char c : text + '\0')
            hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
    return hash;
}

// What -march=native means here.
std::string processor() {
    std::ifstream in("/proc/cpuinfo");
    for (std::string line; std::getline(in, line);) {
        if (line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0) return line;
    }
    return "";
}

std::string compiler() {
    const char* given = std::getenv("STANDIN_CXX");
    return given && *given ? given : STANDIN_COMPILER;
}

// The compiler's exit status; what it said is in the log.
int run_compiler(const fs::path& folder, std::vector<std::string> words, std::string& log) {
    const std::string said = folder / "log.txt";
    words.insert(words.begin(), compiler());
    std::vector<char*> arguments;
    for (std::string& word : words)
        arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, said.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    pid_t pid;
    int status = -1;
    if (posix_spawnp(&pid, words[0].c_str(), &actions, nullptr, arguments.data(), environ) == 0) {
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
        }
    }
    posix_spawn_file_actions_destroy(&actions);
    log = read_file(said);
    return status;
}

// Paths of the temporary folder are not the program's business.
std::string without_folder(std::string text, const std::string& folder) {
    for (size_t at; (at = text.find(folder + "/")) != std::string::npos;)
        text.erase(at, folder.size() + 1);
    return text;
}

fs::path sources(const char* name) {
    return fs::path(STANDIN_SOURCES) / name;
}

// Makes the cubin of unit.cpp, compiled by the given words.
nvrtcResult build_unit(Program& program, const Options& options, const fs::path& folder,
                       std::vector<std::string> words) {
    const std::string object = folder / "unit.o", library = folder / "unit.so";
    words.insert(words.end(), {"-march=native", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique",
                               "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing",
                               "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables",
                               "-c", folder / "unit.cpp", "-o", object});
    if (run_compiler(folder, words, program.log) != 0) return NVRTC_ERROR_COMPILATION;
    std::string link_log;
    if (run_compiler(folder, {"-shared", "-nostdlib", object, "-lgcc", "-o", library}, link_log)) {
        program.log += link_log;
        return NVRTC_ERROR_COMPILATION;
    }
    const std::string bytes = read_file(library);
    program.cubin.assign(bytes.begin(), bytes.end());
    seal_image(reinterpret_cast<unsigned char*>(program.cubin.data()), program.cubin.size(),
               options.architecture);
    return NVRTC_SUCCESS;
}

nvrtcResult build(Program& program, const Options& options, const fs::path& folder) {
    const std::string file = program.name.empty() ? "default_program" : program.name;
    write_file(folder / "in" / file, with_dynamic_shared(program.source));
    for (const auto& [name, text] : program.headers)
        write_file(folder / "in" / name, with_dynamic_shared(text));

    const std::string input = folder / "in" / file;
    std::vector<std::string> common = {
        "-x",
        "c++",
        "-std=gnu" + options.standard.substr(1),
        "-nostdinc",
        "-w",
        "-I",
        folder / "in",
        "-D__CUDA_ARCH__=" + std::to_string(options.architecture * 10)};
    common.insert(common.end(), options.definitions.begin(), options.definitions.end());

    std::vector<std::string> words = common;
    const std::string preprocessed = folder / "preprocessed";
    for (const char* definition :
         {"-DQI_PLAIN=1", "-DQI_STANDIN=1", "-D__CUDACC__=1", "-D__CUDACC_RTC__=1"})
        words.push_back(definition);
    words.insert(words.end(), {"-E", input, "-o", preprocessed});
    if (run_compiler(folder, words, program.log) != 0) return NVRTC_ERROR_COMPILATION;

    std::string unit = "#include \"" + file + "\"\n" +
                       "extern \"C\" __attribute__((visibility(\"default\"))) "
                       "const QiKernel qi_standin_kernels[] = {\n";
    for (const KernelName& kernel : find_kernels(read_file(preprocessed)))
        unit += "qi_standin::Trampoline<&" + kernel.name + ">::describe(\"" + kernel.name + "\", " +
                kernel.max_threads + "),\n";
    unit += "{}};\n";
    write_file(folder / "unit.cpp", unit);

    words = common;
    // Checked as the hardware would, or would not but should: executor.cpp reports.
    words.insert(words.end(), {"-O2", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all",
                               "-include", sources("shim.h")});
    return build_unit(program, options, folder, words);
}

std::string real_nvrtc() {
    const char* given = std::getenv("STANDIN_NVRTC");
    return given ? given : "";
}

// The PTX is kept beside the object, whose reports name its lines.
nvrtcResult build_from_ptx(Program& program, const Options& options, const fs::path& folder,
                           const fs::path& kept) {
    std::string text;
    const int result = compile_to_ptx(real_nvrtc(), program.name, program.source, program.headers,
                                      options.others, options.architecture, text, program.log);
    if (result != NVRTC_SUCCESS) return static_cast<nvrtcResult>(result);
    write_file(kept, text);
    try {
        write_file(folder / "unit.cpp", ptx::translate_module(text));
    } catch (const ptx::Unknown& unknown) {
        program.log += program.name + " as PTX, " + unknown.what() + "\n";
        return NVRTC_ERROR_COMPILATION;
    }
    // ptx_unit.h says why nothing is optimised.
    return build_unit(
        program, options, folder,
        {"-x", "c++", "-std=gnu++20", "-nostdinc", "-w", "-O0", "-include", sources("ptx_warp.h")});
}

nvrtcResult compile(Program& program, const Options& options) {
    std::vector<std::string> made_from = {read_file(sources("shim.h")),
                                          read_file(sources("abi.h")),
                                          STANDIN_BUILD,
                                          compiler(),
                                          processor(),
                                          std::to_string(options.architecture),
                                          options.standard,
                                          program.name,
                                          program.source};
    for (const auto& [name, text] : program.headers) {
        made_from.push_back(name);
        made_from.push_back(text);
    }
    made_from.insert(made_from.end(), options.definitions.begin(), options.definitions.end());
    const bool from_ptx = !real_nvrtc().empty();
    if (from_ptx) {
        made_from.push_back(real_nvrtc());
        made_from.insert(made_from.end(), options.others.begin(), options.others.end());
        for (const char* name : {"ptx_unit.h", "ptx_warp.h", "ptx_module.cpp", "ptx_operand.cpp",
                                 "ptx_instruction.cpp", "ptx_translate.cpp"})
            made_from.push_back(read_file(sources(name)));
    }
    char key[17];
    std::snprintf(key, sizeof key, "%016llx", static_cast<unsigned long long>(hash_of(made_from)));

    const char* given = std::getenv("STANDIN_CACHE");
    const fs::path cache = given && *given ? fs::path(given) : own_folder() / "kernels";
    fs::create_directories(cache);
    const fs::path entry = cache / key;
    if (fs::exists(entry)) {
        const std::string bytes = read_file(entry);
        program.cubin.assign(bytes.begin(), bytes.end());
        return NVRTC_SUCCESS;
    }
    std::string pattern = fs::temp_directory_path() / "standin-nvrtc-XXXXXX";
    if (!mkdtemp(pattern.data())) return NVRTC_ERROR_INTERNAL_ERROR;
    const nvrtcResult result =
        from_ptx ? build_from_ptx(program, options, pattern, entry.string() + ".ptx")
                 : build(program, options, pattern);
    program.log = without_folder(without_folder(program.log, pattern + "/in"), pattern);
    std::error_code ignored;
    fs::remove_all(pattern, ignored);
    if (result == NVRTC_SUCCESS) {
        static std::atomic<int> counter{0};
        const fs::path half = cache / (std::string(key) + "." + std::to_string(getpid()) + "." +
                                       std::to_string(counter++));
        write_file(half, {program.cubin.begin(), program.cubin.end()});
        fs::rename(half, entry);
    }
    return result;
}

template <class Body>
nvrtcResult api(const char* name, Body&& body) {
    if (const nvrtcResult injected = enter(name); injected != NVRTC_SUCCESS) return injected;
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return NVRTC_ERROR_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "stand-in NVRTC: %s\n", error.what());
        return NVRTC_ERROR_INTERNAL_ERROR;
    }
}

Program* find(nvrtcProgram handle) {
    std::lock_guard lock(programs_mutex);
    auto found = programs.find(handle);
    return found == programs.end() ? nullptr : found->second.get();
}

}  // namespace
}  // namespace standin

using namespace standin;

NVRTC_API nvrtcResult nvrtcVersion(int* major, int* minor) {
    return api("nvrtcVersion", [&] {
        if (!major || !minor) return NVRTC_ERROR_INVALID_INPUT;
        *major = cuda_major;
        *minor = version_minor;
        return NVRTC_SUCCESS;
    });
}

NVRTC_API const char* nvrtcGetErrorString(nvrtcResult code) {
    switch (code) {
        case NVRTC_SUCCESS:
            return "NVRTC_SUCCESS";
        case NVRTC_ERROR_OUT_OF_MEMORY:
            return "NVRTC_ERROR_OUT_OF_MEMORY";
        case NVRTC_ERROR_PROGRAM_CREATION_FAILURE:
            return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
        case NVRTC_ERROR_INVALID_INPUT:
            return "NVRTC_ERROR_INVALID_INPUT";
        case NVRTC_ERROR_INVALID_PROGRAM:
            return "NVRTC_ERROR_INVALID_PROGRAM";
        case NVRTC_ERROR_INVALID_OPTION:
            return "NVRTC_ERROR_INVALID_OPTION";
        case NVRTC_ERROR_COMPILATION:
            return "NVRTC_ERROR_COMPILATION";
        case NVRTC_ERROR_INTERNAL_ERROR:
            return "NVRTC_ERROR_INTERNAL_ERROR";
    }
    return "NVRTC_ERROR unknown";
}

NVRTC_API nvrtcResult nvrtcGetNumSupportedArchs(int* n) {
    return api("nvrtcGetNumSupportedArchs", [&] {
        if (!n) return NVRTC_ERROR_INVALID_INPUT;
        *n = static_cast<int>(std::size(architectures));
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcGetSupportedArchs(int* list) {
    return api("nvrtcGetSupportedArchs", [&] {
        if (!list) return NVRTC_ERROR_INVALID_INPUT;
        std::copy(std::begin(architectures), std::end(architectures), list);
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcCreateProgram(nvrtcProgram* handle, const char* source, const char* name,
                                         int n_headers, const char* const* headers,
                                         const char* const* header_names) {
    return api("nvrtcCreateProgram", [&] {
        if (!handle || !source || n_headers < 0) return NVRTC_ERROR_INVALID_INPUT;
        if (n_headers > 0 && (!headers || !header_names)) return NVRTC_ERROR_INVALID_INPUT;
        auto program = std::make_unique<Program>();
        program->source = source;
        program->name = name ? name : "";
        for (int i = 0; i < n_headers; i++) {
            if (!headers[i] || !header_names[i]) return NVRTC_ERROR_INVALID_INPUT;
            program->headers[header_names[i]] = headers[i];
        }
        static std::atomic<uintptr_t> next{0x100};
        *handle = reinterpret_cast<nvrtcProgram>(next.fetch_add(0x10));
        std::lock_guard lock(programs_mutex);
        programs[*handle] = std::move(program);
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcDestroyProgram(nvrtcProgram* handle) {
    const nvrtcResult injected = enter("nvrtcDestroyProgram");  // it is destroyed all the same
    if (!handle) return NVRTC_ERROR_INVALID_PROGRAM;
    std::lock_guard lock(programs_mutex);
    if (programs.erase(*handle) == 0) return NVRTC_ERROR_INVALID_PROGRAM;
    *handle = nullptr;
    return injected;
}

NVRTC_API nvrtcResult nvrtcCompileProgram(nvrtcProgram handle, int n_options,
                                          const char* const* options) {
    return api("nvrtcCompileProgram", [&] {
        Program* program = find(handle);
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
        if (n_options < 0 || (n_options > 0 && !options)) return NVRTC_ERROR_INVALID_INPUT;
        Options parsed;
        program->log.clear();
        program->cubin.clear();
        if (!parse_options(n_options, options, parsed, program->log))
            return NVRTC_ERROR_INVALID_OPTION;
        const nvrtcResult result = compile(*program, parsed);
        if (!parsed.real) program->cubin.clear();
        return result;
    });
}

NVRTC_API nvrtcResult nvrtcGetCUBINSize(nvrtcProgram handle, size_t* bytes) {
    return api("nvrtcGetCUBINSize", [&] {
        Program* program = find(handle);
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
        if (!bytes) return NVRTC_ERROR_INVALID_INPUT;
        *bytes = program->cubin.size();
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcGetCUBIN(nvrtcProgram handle, char* cubin) {
    return api("nvrtcGetCUBIN", [&] {
        Program* program = find(handle);
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
        if (!cubin || program->cubin.empty()) return NVRTC_ERROR_INVALID_INPUT;
        std::copy(program->cubin.begin(), program->cubin.end(), cubin);
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram handle, size_t* bytes) {
    return api("nvrtcGetProgramLogSize", [&] {
        Program* program = find(handle);
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
        if (!bytes) return NVRTC_ERROR_INVALID_INPUT;
        *bytes = program->log.size() + 1;
        return NVRTC_SUCCESS;
    });
}

NVRTC_API nvrtcResult nvrtcGetProgramLog(nvrtcProgram handle, char* log) {
    return api("nvrtcGetProgramLog", [&] {
        Program* program = find(handle);
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
        if (!log) return NVRTC_ERROR_INVALID_INPUT;
        std::memcpy(log, program->log.c_str(), program->log.size() + 1);
        return NVRTC_SUCCESS;
    });
}
