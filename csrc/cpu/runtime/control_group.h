// The control groups (cgroups, versions 1 and 2) of this process: containers and systemd's slices
// bound a process by them, not by the CPUs and the memory it sees.
#pragma once

#include <string>
#include <vector>

namespace codellama_rt {
#pragma GCC visibility push(default)

// Folders of this process's groups of a controller ("cpu", "memory"), of both versions, from its
// own group up to the topmost that is mounted: a limit of any of them holds. `root` goes before
// every path; tests have trees of their own there. Groups that are not visible are left out.
std::vector<std::string> control_groups(const std::string& controller,
                                        const std::string& root = "");

// CPUs' worth of time that these groups allow, the smallest counts; infinity without a limit.
double cpu_quota(const std::string& root = "");

#pragma GCC visibility pop
}  // namespace codellama_rt
