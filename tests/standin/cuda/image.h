// The "cubin": a shared object for this processor whose ELF flags hold the architecture it was
// compiled for and a checksum, so that a damaged one is refused before the loader sees it.
#pragma once

#include <elf.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace standin {

struct ImageInfo {
    size_t bytes;    // 0: not an image
    int capability;  // 10 · major + minor
};

// Of all bytes but the flags, 20 bits.
inline uint32_t image_checksum(const unsigned char* image, size_t bytes) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) {
        const bool flags = i >= offsetof(Elf64_Ehdr, e_flags) &&
                           i < offsetof(Elf64_Ehdr, e_flags) + sizeof(Elf64_Word);
        hash = (hash ^ (flags ? 0 : image[i])) * 0x100000001b3u;
    }
    return static_cast<uint32_t>(hash >> 20 & 0xfffffu);
}

// What the driver does: it gets no size, and takes the header's word for it.
inline ImageInfo inspect_image(const void* image) {
    Elf64_Ehdr head;
    std::memcpy(&head, image, SELFMAG);
    if (std::memcmp(&head, ELFMAG, SELFMAG) != 0) return {0, 0};
    std::memcpy(&head, image, sizeof head);
#if defined(__x86_64__)
    constexpr unsigned machine = EM_X86_64;
#else
    constexpr unsigned machine = EM_AARCH64;
#endif
    if (head.e_machine != machine || head.e_shentsize != sizeof(Elf64_Shdr)) return {0, 0};
    const size_t bytes = head.e_shoff + static_cast<size_t>(head.e_shnum) * head.e_shentsize;
    if (bytes > (64u << 20)) return {0, 0};
    const int capability = static_cast<int>(head.e_flags >> 20);
    if (image_checksum(static_cast<const unsigned char*>(image), bytes) !=
        (head.e_flags & 0xfffffu))
        return {0, 0};
    return {bytes, capability};
}

inline void seal_image(unsigned char* image, size_t bytes, int capability) {
    const uint32_t flags = static_cast<uint32_t>(capability) << 20 | image_checksum(image, bytes);
    std::memcpy(image + offsetof(Elf64_Ehdr, e_flags), &flags, sizeof flags);
}

}  // namespace standin
