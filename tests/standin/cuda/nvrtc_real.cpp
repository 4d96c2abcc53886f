#include "nvrtc_real.h"

#include <dlfcn.h>
#include <mutex>

namespace standin {
namespace {

namespace fs = std::filesystem;

constexpr int internal_error = 11;  // NVRTC's

struct Real {
    int (*create)(void**, const char*, const char*, int, const char* const*, const char* const*);
    int (*destroy)(void**);
    int (*compile)(void*, int, const char* const*);
    int (*ptx_size)(void*, size_t*);
    int (*ptx)(void*, char*);
    int (*log_size)(void*, size_t*);
    int (*log)(void*, char*);
};

template <class F>
bool find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
}

// Null, with the reason in `log`, when the library is not what it should be.
const Real* load(const fs::path& path, std::string& log) {
    static std::mutex mutex;
    static std::map<fs::path, Real> loaded;
    std::lock_guard lock(mutex);
    if (const auto found = loaded.find(path); found != loaded.end()) return &found->second;
    // It asks for its built-in functions by name, and they lie beside it.
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(path.parent_path(), ignored)) {
        if (entry.path().filename().string().rfind("libnvrtc-builtins.so.", 0) == 0)
            dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
    // Its own functions, not the stand-in's of the same names.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    Real real;
    if (!library || !find(library, "nvrtcCreateProgram", real.create) ||
        !find(library, "nvrtcDestroyProgram", real.destroy) ||
        !find(library, "nvrtcCompileProgram", real.compile) ||
        !find(library, "nvrtcGetPTXSize", real.ptx_size) ||
        !find(library, "nvrtcGetPTX", real.ptx) ||
        !find(library, "nvrtcGetProgramLogSize", real.log_size) ||
        !find(library, "nvrtcGetProgramLog", real.log)) {
        const char* why = dlerror();
        log = "STANDIN_NVRTC: " + std::string(why ? why : "no NVRTC") + "\n";
        return nullptr;
    }
    return &loaded.emplace(path, real).first->second;
}

std::vector<const char*> pointers_to(const std::vector<std::string>& texts) {
    std::vector<const char*> pointers;
    for (const std::string& text : texts)
        pointers.push_back(text.c_str());
    return pointers;
}

std::string text_of(int (*size_of)(void*, size_t*), int (*get)(void*, char*), void* program) {
    size_t n = 0;
    if (size_of(program, &n) != 0 || n == 0) return "";
    std::string text(n, '\0');
    if (get(program, text.data()) != 0) return "";
    text.resize(n - 1);
    return text;
}

}  // namespace

int compile_to_ptx(const fs::path& library, const std::string& name, const std::string& source,
                   const std::map<std::string, std::string>& headers,
                   std::vector<std::string> options, int architecture, std::string& ptx,
                   std::string& log) {
    const Real* real = load(library, log);
    if (!real) return internal_error;
    std::vector<std::string> names, texts;
    for (const auto& [header, text] : headers) {
        names.push_back(header);
        texts.push_back(text);
    }
    void* program = nullptr;
    const int made =
        real->create(&program, source.c_str(), name.c_str(), static_cast<int>(names.size()),
                     pointers_to(texts).data(), pointers_to(names).data());
    if (made != 0) return made;
    options.push_back("--gpu-architecture=compute_" + std::to_string(architecture));
    const int result =
        real->compile(program, static_cast<int>(options.size()), pointers_to(options).data());
    log = text_of(real->log_size, real->log, program);
    if (result == 0) ptx = text_of(real->ptx_size, real->ptx, program);
    real->destroy(&program);
    return result;
}

}  // namespace standin
