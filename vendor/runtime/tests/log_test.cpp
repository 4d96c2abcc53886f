// The ring of log lines: order, loss when nobody reads, several writers, fork.
#include "base/log.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "kernel_checks.h"
#include "qinfer.h"

using namespace qi;
using namespace qi::test;

namespace {

struct Line {
    LogLevel level;
    std::string text;
};

std::vector<Line> drain() {
    std::vector<Line> lines;
    for (Line line; next_log_line(line.level, line.text);)
        lines.push_back(line);
    return lines;
}

void test_order(Checks& checks) {
    checks.expect(drain().empty(), "lines nobody wrote");
    log(LogLevel::warning, "first");
    log(LogLevel::debug, "");
    log(LogLevel::error, "third");
    const auto lines = drain();
    checks.expect(lines.size() == 3, "%zu lines, not 3", lines.size());
    checks.expect(lines[0].text == "first" && lines[0].level == LogLevel::warning, "first line");
    checks.expect(lines[1].text.empty() && lines[1].level == LogLevel::debug, "second line");
    checks.expect(lines[2].text == "third" && lines[2].level == LogLevel::error, "third line");
}

void test_loss(Checks& checks) {
    for (int i = 0; i < 5000; ++i)
        log(LogLevel::info, std::to_string(i));
    const auto lines = drain();
    checks.expect(lines.size() > 100 && lines.size() < 5000, "%zu lines kept", lines.size());
    checks.expect(lines[0].level == LogLevel::warning &&
                      lines[0].text.starts_with(std::to_string(5001 - lines.size()) + " "),
                  "the loss of %zu lines is told as '%s'", 5001 - lines.size(),
                  lines[0].text.c_str());
    checks.expect(lines.back().text == "4999", "the last line is %s", lines.back().text.c_str());
    checks.expect(drain().empty(), "the loss is told twice");
}

// Every writer's lines arrive once and in its order.
void test_writers(Checks& checks) {
    constexpr int n_writers = 4, n_lines = 200;
    std::vector<std::thread> writers;
    for (int w = 0; w < n_writers; ++w)
        writers.emplace_back([w] {
            for (int i = 0; i < n_lines; ++i)
                log(LogLevel::info, std::to_string(w) + " " + std::to_string(i));
        });
    for (std::thread& writer : writers)
        writer.join();
    int next[n_writers] = {};
    for (const Line& line : drain()) {
        const int w = line.text[0] - '0';
        checks.expect(line.text == std::to_string(w) + " " + std::to_string(next[w]),
                      "'%s' where line %d of writer %d was due", line.text.c_str(), next[w], w);
        ++next[w];
    }
    for (int n : next)
        checks.expect(n == n_lines, "%d lines of %d arrived", n, n_lines);
}

void test_c_interface(Checks& checks) {
    char text[8];
    checks.expect(qi_log_next(text, sizeof text) == 0, "a line from an empty ring");
    log(LogLevel::warning, "short");
    checks.expect(qi_log_next(text, 0) == 0 && qi_log_next(nullptr, 8) == 0, "a line without room");
    checks.expect(qi_log_next(text, sizeof text) == 30 && std::string(text) == "short",
                  "the line comes as '%s'", text);
    log(LogLevel::info, "sixfüü");  // 8 bytes; 7 would end inside the last character
    checks.expect(qi_log_next(text, sizeof text) == 20 && std::string(text) == "sixfü",
                  "a line too long comes as '%s'", text);
}

// Forks while another thread logs without pause: the child must still be able to log.
void test_fork(Checks& checks) {
    std::atomic<bool> stop{false};
    std::thread writer([&] {
        while (!stop)
            log(LogLevel::debug, "noise");
    });
    for (int i = 0; i < 100; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);  // a deadlock ends as a signal
            drain();
            log(LogLevel::info, "from the child");
            const auto lines = drain();
            _exit(lines.size() == 1 && lines[0].text == "from the child" ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        checks.expect(status == 0, "child %d ended with status %#x", i, status);
    }
    stop = true;
    writer.join();
    drain();
}

}  // namespace

int main() {
    Checks checks;
    test_order(checks);
    test_loss(checks);
    test_writers(checks);
    test_c_interface(checks);
    test_fork(checks);
    return checks.status();
}
