#include "device/cuda/product_choice.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "base/log.h"
#include "base/output_file.h"
#include "base/sha256.h"
#include "base/text.h"
#include "device/cuda/cublas.h"
#include "device/cuda/embedded.h"
#include "device/cuda/libraries.h"

namespace qi::cuda {

namespace {

constexpr const char* by_hand = "by hand";

std::string name_of(ProductChoice::Inner inner) {
    return inner == ProductChoice::Inner::rows ? "rows" : "neurons";
}

// Batches up to a power of two are measured together.
std::string tokens_of(int64_t n_tokens) {
    return std::to_string(std::bit_ceil(uint64_t(n_tokens)));
}

// Findings hold for a version of cuBLAS and of our kernels.
std::string head_line() {
    Sha256Stream sources;
    for (const KernelSource& source : kernel_sources())
        sources.update(source.text);
    const CublasInfo cublas = cublas_info();
    return format("cuBLAS %d.%d, kernels %s", cublas.major, cublas.minor,
                  hex(sources.finish()).substr(0, 16).c_str());
}

bool fits(const std::string& pattern, const std::string& word) {
    return pattern == "*" || pattern == word;
}

}  // namespace

ProductChoice::ProductChoice(const Gpu& gpu) : head_(head_line()) {
    const std::string folder = configuration().cache_folder;
    if (folder.empty()) return;
    std::string name = gpu.attributes().name;
    for (char& c : name)
        if (!std::isalnum(static_cast<unsigned char>(c))) c = '-';
    path_ = folder + "/products-" + name + ".txt";
    read();
}

void ProductChoice::read() {
    std::ifstream file(path_);
    std::string line;
    if (!std::getline(file, line)) return;
    by_hand_ = line == by_hand;
    if (!by_hand_ && line != head_) return;  // made for something else: measured anew
    while (std::getline(file, line)) {
        std::istringstream words(line);
        Finding finding;
        words >> finding.type >> finding.inner >> finding.tokens >> finding.winner;
        const bool known = finding.winner == "cublas" || finding.winner == "tiles";
        if (known) {
            findings_.push_back(finding);
        } else if (by_hand_) {
            log(LogLevel::warning,
                format("%s: the line %s is left out, expected such as 'Q4_0 rows 128 cublas'",
                       qi::quoted(path_, path_.size()).c_str(), qi::quoted(line).c_str()));
        }
    }
}

std::optional<bool> ProductChoice::cublas(Type type, Inner inner, int64_t n_tokens) const {
    const std::lock_guard lock(mutex_);
    for (const Finding& finding : findings_)
        if (fits(finding.type, traits(type).name) && fits(finding.inner, name_of(inner)) &&
            fits(finding.tokens, tokens_of(n_tokens)))
            return finding.winner == "cublas";
    return std::nullopt;
}

void ProductChoice::set(Type type, Inner inner, int64_t n_tokens, bool cublas) {
    const std::lock_guard lock(mutex_);
    findings_.push_back(
        {traits(type).name, name_of(inner), tokens_of(n_tokens), cublas ? "cublas" : "tiles"});
    if (!path_.empty() && !by_hand_) write();
}

void ProductChoice::write() const {
    try {
        std::error_code failure;
        std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), failure);
        std::string text = head_ + "\n";
        for (const Finding& f : findings_)
            text += f.type + " " + f.inner + " " + f.tokens + " " + f.winner + "\n";
        OutputFile file(path_);
        file.write(std::as_bytes(std::span(text)));
        file.commit();
    } catch (const Error& error) {
        log(LogLevel::debug, format("what multiplies faster is not kept: %s", error.what()));
    }
}

}  // namespace qi::cuda
