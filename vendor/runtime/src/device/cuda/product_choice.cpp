#include "device/cuda/product_choice.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/cpu.h"
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

using What = ProductChoice::What;

constexpr const char* names[] = {"rows", "neurons", "streamed"};
// What is faster, and what is not.
constexpr const char* winners[][2] = {{"cublas", "tiles"}, {"cublas", "tiles"}, {"gpu", "host"}};

// Batches up to a power of two are measured together.
std::string tokens_of(int64_t n_tokens) {
    return std::to_string(std::bit_ceil(uint64_t(n_tokens)));
}

std::string cublas_version() {
    try {
        const CublasInfo cublas = cublas_info();
        return format("cuBLAS %d.%d", cublas.major, cublas.minor);
    } catch (const Error&) {
        return "no cuBLAS";
    }
}

// Findings hold for a version of cuBLAS, of our kernels and of the processor's side.
std::string head_line() {
    Sha256Stream sources;
    for (const KernelSource& source : kernel_sources())
        sources.update(source.text);
    return format("%s, %d cores, kernels %s", cublas_version().c_str(), cpu_info().n_usable_cores,
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
        words >> finding.type >> finding.what >> finding.tokens >> finding.winner;
        bool known = false;
        for (const auto& pair : winners)
            known |= finding.winner == pair[0] || finding.winner == pair[1];
        if (known) {
            findings_.push_back(finding);
        } else if (by_hand_) {
            log(LogLevel::warning,
                format("%s: the line %s is left out, expected such as 'Q4_0 rows 128 cublas'",
                       qi::quoted(path_, path_.size()).c_str(), qi::quoted(line).c_str()));
        }
    }
}

std::optional<bool> ProductChoice::known(Type type, What what, int64_t n_tokens) const {
    const std::lock_guard lock(mutex_);
    for (const Finding& finding : findings_)
        if (fits(finding.type, traits(type).name) && fits(finding.what, names[size_t(what)]) &&
            fits(finding.tokens, tokens_of(n_tokens)))
            return finding.winner == winners[size_t(what)][0];
    return std::nullopt;
}

void ProductChoice::set(Type type, What what, int64_t n_tokens, bool faster) {
    const std::lock_guard lock(mutex_);
    findings_.push_back({traits(type).name, names[size_t(what)], tokens_of(n_tokens),
                         winners[size_t(what)][faster ? 0 : 1]});
    if (!path_.empty() && !by_hand_) write();
}

void ProductChoice::write() const {
    try {
        std::error_code failure;
        std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), failure);
        std::string text = head_ + "\n";
        for (const Finding& f : findings_)
            text += f.type + " " + f.what + " " + f.tokens + " " + f.winner + "\n";
        OutputFile file(path_);
        file.write(std::as_bytes(std::span(text)));
        file.commit();
    } catch (const Error& error) {
        log(LogLevel::debug, format("what multiplies faster is not kept: %s", error.what()));
    }
}

}  // namespace qi::cuda
