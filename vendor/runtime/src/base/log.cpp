// The ring of log lines that wait for Python.
#include "base/log.h"

#include <pthread.h>

#include <deque>
#include <mutex>
#include <utility>

#include "base/error.h"

namespace qi {

namespace {

// A load that warns about every tensor of a large model still fits.
constexpr size_t max_lines = 1024;

struct Ring {
    std::mutex mutex;
    std::deque<std::pair<LogLevel, std::string>> lines;
    size_t n_lost = 0;  // since the reader was last told
};

// Never destroyed: a thread may still log while the process runs its exit handlers.
Ring& ring() {
    static Ring& instance = []() -> Ring& {
        // A fork while another thread holds the mutex would leave it locked for ever in the child.
        pthread_atfork([] { ring().mutex.lock(); }, [] { ring().mutex.unlock(); },
                       [] { ring().mutex.unlock(); });
        return *new Ring;
    }();
    return instance;
}

}  // namespace

void log(LogLevel level, std::string text) {
    Ring& r = ring();
    std::lock_guard lock(r.mutex);
    if (r.lines.size() == max_lines) {
        r.lines.pop_front();
        ++r.n_lost;
    }
    r.lines.emplace_back(level, std::move(text));
}

bool next_log_line(LogLevel& level, std::string& text) {
    Ring& r = ring();
    std::lock_guard lock(r.mutex);
    if (r.n_lost > 0) {
        level = LogLevel::warning;
        text = format("%zu log lines were lost: the ring holds %zu and nobody read it", r.n_lost,
                      max_lines);
        r.n_lost = 0;
        return true;
    }
    if (r.lines.empty()) return false;
    level = r.lines.front().first;
    text = std::move(r.lines.front().second);
    r.lines.pop_front();
    return true;
}

}  // namespace qi
