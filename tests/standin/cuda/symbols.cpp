#include "symbols.h"

#include <elf.h>
#include <cstdlib>
#include <cstring>

namespace standin {
namespace {

// "f" of "_ZZ1fE1s", the name of variable s in extern "C" function f; empty for other names.
std::string function_of(const char* symbol) {
    if (std::strncmp(symbol, "_ZZ", 3) != 0) return "";
    char* name;
    const unsigned long length = std::strtoul(symbol + 3, &name, 10);
    if (length == 0 || std::strlen(name) <= length || name[length] != 'E') return "";
    return std::string(name, length);
}

}  // namespace

SharedSizes shared_sizes(const std::vector<std::byte>& image) {
    SharedSizes sizes;
    Elf64_Ehdr head;
    std::memcpy(&head, image.data(), sizeof head);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + head.e_shoff);
    for (unsigned i = 0; i < head.e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const auto* symbols =
            reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
        const auto* names =
            reinterpret_cast<const char*>(image.data() + sections[sections[i].sh_link].sh_offset);
        for (size_t j = 0; j < sections[i].sh_size / sizeof(Elf64_Sym); j++) {
            if (ELF64_ST_TYPE(symbols[j].st_info) != STT_TLS || symbols[j].st_shndx == SHN_UNDEF)
                continue;
            const std::string function = function_of(names + symbols[j].st_name);
            // 16: the alignment that most shared arrays ask for.
            const auto bytes = static_cast<uint32_t>((symbols[j].st_size + 15) / 16 * 16);
            if (function.empty()) {
                sizes.elsewhere += bytes;
            } else {
                sizes.by_function[function] += bytes;
            }
        }
    }
    return sizes;
}

}  // namespace standin
