// Modules, functions, launches.
#include <algorithm>
#include <cstring>

#include "control.h"
#include "image.h"

using namespace standin;

namespace {

int whole_warps(int threads) {
    return (threads + 31) / 32 * 32;
}

// A cubin runs on its own major version, from its minor version on.
bool runs_on(int binary, int capability) {
    return binary / 10 == capability / 10 && binary % 10 <= capability % 10;
}

Function& function_of(Driver& d, CUfunction handle) {
    auto found = d.functions.find(handle);
    require(found != d.functions.end(), CUDA_ERROR_INVALID_HANDLE);
    require(found->second->module->context == &d.current(), CUDA_ERROR_INVALID_HANDLE);
    return *found->second;
}

int max_threads(const Function& function) {
    return function.info.reply.max_threads ? static_cast<int>(function.info.reply.max_threads)
                                           : 1024;
}

CUresult load(Driver& d, CUmodule* handle, const void* image) {
    require(handle && image, CUDA_ERROR_INVALID_VALUE);
    const ImageInfo info = inspect_image(image);
    require(info.bytes != 0, CUDA_ERROR_INVALID_IMAGE);
    require(runs_on(info.capability, d.settings.capability), CUDA_ERROR_NO_BINARY_FOR_GPU);
    const LoadedModule loaded =
        d.gpu.load_module({static_cast<const std::byte*>(image), info.bytes});
    if (loaded.id == 0) d.complain(CUDA_ERROR_INVALID_IMAGE, "cuModuleLoadData: " + loaded.text);
    if (loaded.kernels.size() * kernel_bytes > d.free_on(d.current())) {
        d.gpu.send(Kind::unload_module, 0, 0, {{&loaded.id, sizeof loaded.id}});
        throw Failure{CUDA_ERROR_OUT_OF_MEMORY};
    }
    auto module = std::make_unique<Module>();
    module->context = &d.current();
    module->id = loaded.id;
    module->binary_version = info.capability;
    for (size_t i = 0; i < loaded.kernels.size(); i++) {
        auto function = std::make_unique<Function>();
        function->module = module.get();
        function->index = i;
        function->info = loaded.kernels[i];
        const uint32_t fixed = function->info.reply.static_shared;
        require(fixed <= default_shared, CUDA_ERROR_INVALID_IMAGE);
        function->max_dynamic_shared = default_shared - fixed;
        function->handle = reinterpret_cast<CUfunction>(function.get());
        d.functions[function->handle] = function.get();
        module->functions.push_back(std::move(function));
    }
    *handle = d.modules.add(std::move(module));
    return CUDA_SUCCESS;
}

}  // namespace

STANDIN_API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return api("cuModuleLoadData", everything | never_captured,
               [&](Driver& d, auto&) { return load(d, module, image); });
}

STANDIN_API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned n_options,
                                        int* options, void** values) {
    return api("cuModuleLoadDataEx", everything | never_captured, [&](Driver& d, auto&) {
        require(n_options == 0 || (options && values), CUDA_ERROR_INVALID_VALUE);
        return load(d, module, image);
    });
}

STANDIN_API CUresult cuModuleUnload(CUmodule handle) {
    return api("cuModuleUnload", everything | never_captured | releases, [&](Driver& d, auto&) {
        Module& module = d.modules.get(handle);
        require(module.context == &d.current(), CUDA_ERROR_INVALID_HANDLE);
        if (d.pending(module.uses))
            return d.complain(CUDA_ERROR_ILLEGAL_STATE,
                              "cuModuleUnload of a module whose kernels may still run");
        d.gpu.send(Kind::unload_module, 0, 0, {{&module.id, sizeof module.id}});
        for (const auto& function : module.functions)
            d.functions.erase(function->handle);
        d.modules.remove(handle);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    return api("cuModuleGetFunction", everything, [&](Driver& d, auto&) {
        require(function && name && *name, CUDA_ERROR_INVALID_VALUE);
        Module& module = d.modules.get(handle);
        require(module.context == &d.current(), CUDA_ERROR_INVALID_HANDLE);
        for (const auto& f : module.functions) {
            if (f->info.name != name) continue;
            *function = f->handle;
            return CUDA_SUCCESS;
        }
        return CUDA_ERROR_NOT_FOUND;
    });
}

STANDIN_API CUresult cuFuncGetAttribute(int* value, int which, CUfunction handle) {
    return api("cuFuncGetAttribute", everything, [&](Driver& d, auto&) {
        require(value, CUDA_ERROR_INVALID_VALUE);
        const Function& f = function_of(d, handle);
        switch (which) {
            case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
                *value = max_threads(f);
                break;
            case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
                *value = static_cast<int>(f.info.reply.static_shared);
                break;
            case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
            case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
            case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
                *value = 0;
                break;
            case CU_FUNC_ATTRIBUTE_NUM_REGS:
                *value = 32;
                break;
            case CU_FUNC_ATTRIBUTE_PTX_VERSION:
            case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
                *value = f.module->binary_version;
                break;
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
                *value = static_cast<int>(f.max_dynamic_shared);
                break;
            case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
                *value = -1;
                break;
            default:
                return CUDA_ERROR_INVALID_VALUE;
        }
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuFuncSetAttribute(CUfunction handle, int which, int value) {
    return api("cuFuncSetAttribute", everything, [&](Driver& d, auto&) {
        Function& f = function_of(d, handle);
        if (which == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
            require(value >= -1 && value <= 100, CUDA_ERROR_INVALID_VALUE);
            return CUDA_SUCCESS;
        }
        require(which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_VALUE);
        const int limit = shared_per_block_optin(d.settings.capability) -
                          static_cast<int>(f.info.reply.static_shared);
        require(value >= 0 && value <= limit, CUDA_ERROR_INVALID_VALUE);
        f.max_dynamic_shared = static_cast<uint32_t>(value);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y,
                                    unsigned grid_z, unsigned block_x, unsigned block_y,
                                    unsigned block_z, unsigned dynamic_shared,
                                    CUstream stream_handle, void** parameters, void** extra) {
    return api("cuLaunchKernel", everything, [&](Driver& d, auto&) {
        Function& f = function_of(d, handle);
        Stream& stream = d.stream(stream_handle);
        require(!extra, CUDA_ERROR_NOT_SUPPORTED);
        require(grid_x && grid_y && grid_z && block_x && block_y && block_z,
                CUDA_ERROR_INVALID_VALUE);
        require(grid_x <= 0x7fffffffu && grid_y <= 65535 && grid_z <= 65535,
                CUDA_ERROR_INVALID_VALUE);
        require(block_x <= 1024 && block_y <= 1024 && block_z <= 64, CUDA_ERROR_INVALID_VALUE);
        require(block_x * block_y * block_z <= 1024, CUDA_ERROR_INVALID_VALUE);
        require(block_x * block_y * block_z <= static_cast<unsigned>(max_threads(f)),
                CUDA_ERROR_INVALID_VALUE);
        require(dynamic_shared <= f.max_dynamic_shared, CUDA_ERROR_INVALID_VALUE);
        const KernelReply& info = f.info.reply;
        require(info.n_parameters == 0 || parameters, CUDA_ERROR_INVALID_VALUE);

        // The values as they are now: the caller's variables may be gone when the kernel runs.
        std::vector<std::byte> packed(info.packed_size);
        for (uint32_t i = 0; i < info.n_parameters; i++) {
            require(parameters[i], CUDA_ERROR_INVALID_VALUE);
            std::memcpy(packed.data() + info.offsets[i], parameters[i], info.sizes[i]);
            if (info.sizes[i] != 8) continue;
            uint64_t address;  // if it is a pointer
            std::memcpy(&address, parameters[i], 8);
            d.note_use(stream, address);
        }
        const Launch launch = {
            f.module->id,   f.index,         {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
            dynamic_shared, info.packed_size};
        d.submit(stream, Kind::launch, {{&launch, sizeof launch}, {packed.data(), packed.size()}},
                 f.module);
        d.launches += !stream.capture;
        d.lone_launches += !stream.capture;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle,
                                                                 int threads, size_t shared) {
    return api("cuOccupancyMaxActiveBlocksPerMultiprocessor", everything, [&](Driver& d, auto&) {
        require(blocks && threads > 0, CUDA_ERROR_INVALID_VALUE);
        const Function& f = function_of(d, handle);
        const int capability = d.settings.capability;
        if (threads > max_threads(f) || shared > f.max_dynamic_shared) {
            *blocks = 0;
            return CUDA_SUCCESS;
        }
        const int by_threads = threads_per_multiprocessor(capability) / whole_warps(threads);
        const int reserved = capability >= 80 ? 1024 : 0;
        const int each = static_cast<int>(f.info.reply.static_shared + shared) + reserved;
        const int by_shared =
            each ? (shared_per_block_optin(capability) + reserved) / each : by_threads;
        *blocks = std::min({by_threads, by_shared, 32});
        return CUDA_SUCCESS;
    });
}
