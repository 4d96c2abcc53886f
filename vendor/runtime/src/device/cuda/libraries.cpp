// Finding the toolkit's libraries; nothing here edits the environment or the linker's path.
#include "device/cuda/libraries.h"

#include <dlfcn.h>
#include <glob.h>
#include <link.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "device/cuda/driver.h"

namespace qi::cuda {

namespace {

struct Configured {
    std::mutex mutex;
    Configuration value;
};

Configured& configured() {
    static Configured& instance = *new Configured;
    return instance;
}

std::string path_of(void* handle) {
    const link_map* map = nullptr;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "?";
    return map->l_name;
}

// 13.0's NVRTC has no RPATH and finds its built-ins only when they are loaded before it.
void load_companions(const std::string& folder, const std::vector<std::string>& companions) {
    for (const std::string& pattern : companions) {
        glob_t found = {};
        if (glob((folder + "/" + pattern).c_str(), 0, nullptr, &found) == 0) {
            for (size_t i = 0; i < found.gl_pathc; i++)
                dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_GLOBAL);
        }
        globfree(&found);
    }
}

// `soname` in a folder, or nullptr with the reason added to `refused` when it is there but unfit.
void* load_from(const std::string& folder, const std::string& soname,
                const std::vector<std::string>& companions, std::string& refused) {
    const std::string path = folder + "/" + soname;
    glob_t found = {};
    const bool exists = glob(path.c_str(), 0, nullptr, &found) == 0;
    globfree(&found);
    if (!exists) return nullptr;
    load_companions(folder, companions);
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        const char* reason = dlerror();
        refused += format("; %s does not load (%s)", path.c_str(), reason ? reason : "no reason");
    }
    return handle;
}

}  // namespace

void configure(Configuration configuration) {
    std::lock_guard lock(configured().mutex);
    configured().value = std::move(configuration);
}

Configuration configuration() {
    std::lock_guard lock(configured().mutex);
    return configured().value;
}

const char* install_line(int driver_version) {
    return driver_version >= 13000 ? "pip install \".[cuda]\"" : "pip install \".[cuda12]\"";
}

ToolkitLibrary load_toolkit_library(const char* name, const std::vector<std::string>& companions,
                                    const char* purpose) {
    const int version = driver().version;
    const std::vector<int> majors =
        version >= 13000 ? std::vector<int>{13, 12} : std::vector<int>{12};
    const Configuration where = configuration();
    std::string refused;
    const auto found = [&](void* handle, int major) {
        return ToolkitLibrary{handle, path_of(handle), major};
    };
    const auto soname = [&](int major) { return format("lib%s.so.%d", name, major); };
    for (int major : majors) {
        if (void* handle = dlopen(soname(major).c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD))
            return found(handle, major);
    }
    for (int major : majors) {
        for (const std::string& folder : where.folders) {
            if (void* handle = load_from(folder, soname(major), companions, refused))
                return found(handle, major);
        }
    }
    for (int major : majors) {
        if (void* handle = dlopen(soname(major).c_str(), RTLD_NOW | RTLD_LOCAL))
            return found(handle, major);
    }
    if (const char* toolkit = std::getenv("CUDA_PATH")) {
        for (int major : majors) {
            if (void* handle =
                    load_from(std::string(toolkit) + "/lib64", soname(major), companions, refused))
                return found(handle, major);
        }
    }
    fail(QI_DEVICE,
         "%s, which %s, is not there (%s; looked in %zu configured folders, the system's and "
         "CUDA_PATH%s): %s",
         soname(majors.front()).c_str(), purpose,
         format("the driver is for CUDA %s", version_text(version).c_str()).c_str(),
         where.folders.size(), refused.c_str(), install_line(version));
}

}  // namespace qi::cuda
