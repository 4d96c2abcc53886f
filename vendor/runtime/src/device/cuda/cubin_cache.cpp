// An entry is a header and the cubin; it appears under its name whole or not at all.
#include "device/cuda/cubin_cache.h"

#include <atomic>
#include <cstring>
#include <filesystem>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/output_file.h"
#include "base/text.h"

namespace qi::cuda {

namespace {

struct Header {
    char magic[8];
    uint64_t n_bytes;
    Sha256 checksum;  // of the bytes that follow
};

constexpr char magic[9] = "qicubin1";

std::string entry_path(const std::string& folder, const Sha256& key) {
    return folder + "/" + hex(key) + ".cubin";
}

bool is_whole(std::span<const std::byte> file) {
    Header header;
    if (file.size() < sizeof header) return false;
    std::memcpy(&header, file.data(), sizeof header);
    const auto cubin = file.subspan(sizeof header);
    return std::memcmp(header.magic, magic, sizeof header.magic) == 0 &&
           header.n_bytes == cubin.size() && header.checksum == sha256(cubin);
}

}  // namespace

std::vector<std::byte> read_cached_cubin(const std::string& folder, const Sha256& key) {
    const std::string path = entry_path(folder, key);
    std::error_code failure;
    if (!std::filesystem::exists(path, failure)) return {};
    try {
        const MappedFile file(path, nullptr);
        if (is_whole(file.bytes())) {
            const auto cubin = file.bytes().subspan(sizeof(Header));
            return {cubin.begin(), cubin.end()};
        }
        log(LogLevel::warning, format("the cached kernel %s is damaged: compiling it again",
                                      quoted(path, path.size()).c_str()));
    } catch (const Error& error) {
        log(LogLevel::warning,
            format("a cached kernel cannot be used: %s; compiling it again", error.what()));
    }
    return {};
}

void write_cached_cubin(const std::string& folder, const Sha256& key,
                        std::span<const std::byte> cubin) {
    static std::atomic<bool> said{false};
    std::string reason;
    try {
        std::error_code failure;
        std::filesystem::create_directories(folder, failure);
        if (failure) fail(QI_IO, "%s", failure.message().c_str());
        Header header = {};
        std::memcpy(header.magic, magic, sizeof header.magic);
        header.n_bytes = cubin.size();
        header.checksum = sha256(cubin);
        OutputFile file(entry_path(folder, key));
        file.write(std::as_bytes(std::span(&header, 1)));
        file.write(cubin);
        file.commit();
        return;
    } catch (const std::exception& error) {
        reason = error.what();
    }
    if (!said.exchange(true))
        log(LogLevel::warning,
            format("compiled kernels are not kept, because %s cannot be written (%s); "
                   "QINFER_CACHE_DIR names another folder",
                   quoted(folder, folder.size()).c_str(), reason.c_str()));
}

}  // namespace qi::cuda
