#include "cpu/runtime/control_group.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>

namespace codellama_rt {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

std::vector<std::string> lines_of(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

bool names(const std::string& list, const std::string& name) {
  const std::vector<std::string> items = split(list, ',');
  return std::find(items.begin(), items.end(), name) != items.end();
}

// mountinfo writes blanks and backslashes as three octal digits: "\040".
std::string unescaped(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape = text[i] == '\\' && i + 3 < text.size();
    plain += escape ? char(std::strtol(text.substr(i + 1, 3).c_str(), nullptr, 8)) : text[i];
    i += escape ? 3 : 0;
  }
  return plain;
}

// A hierarchy as it is mounted: its group `top` is seen at `folder`.
struct Mount {
  std::string top, folder;

  // Whether a group lies in it; one outside of the process's namespace reads "/../...".
  bool shows(const std::string& group) const {
    if (group.find("/..") != std::string::npos) return false;
    return top == "/" || group == top || group.compare(0, top.size() + 1, top + "/") == 0;
  }
  // From the group, which it shows, up to the top.
  void add_folders(std::string group, std::vector<std::string>* folders) const {
    if (top != "/") group.erase(0, top.size());
    while (!group.empty() && group != "/") {
      folders->push_back(folder + group);
      group.erase(group.rfind('/'));
    }
    folders->push_back(folder);
  }
};

// "31 23 0:28 / /sys/fs/cgroup/cpu rw,... [tags] - cgroup cgroup rw,cpu,cpuacct", version 1, or
// "... - cgroup2 cgroup2 rw", version 2, which has all controllers.
std::vector<Mount> mounts_of(const std::string& controller, bool version_2,
                             const std::string& root) {
  std::vector<Mount> mounts;
  for (const std::string& line : lines_of(root + "/proc/self/mountinfo")) {
    const std::vector<std::string> fields = split(line, ' ');
    const auto dash = std::find(fields.begin(), fields.end(), "-");
    if (dash - fields.begin() < 6 || fields.end() - dash < 4) continue;
    if (version_2 ? dash[1] != "cgroup2" : dash[1] != "cgroup" || !names(dash[3], controller)) {
      continue;
    }
    mounts.push_back({unescaped(fields[3]), root + unescaped(fields[4])});
  }
  return mounts;
}

// quota / period, both positive; anything else ("max", -1, no file) is no limit.
double cpus(const std::string& quota, const std::string& period) {
  const double limit = std::strtoll(quota.c_str(), nullptr, 10);
  const double per = std::strtoll(period.c_str(), nullptr, 10);
  return limit > 0 && per > 0 ? limit / per : std::numeric_limits<double>::infinity();
}

std::string first_line(const std::string& path) {
  const std::vector<std::string> lines = lines_of(path);
  return lines.empty() ? "" : lines[0];
}

}  // namespace

std::vector<std::string> control_groups(const std::string& controller, const std::string& root) {
  std::vector<std::string> folders;
  for (const std::string& line : lines_of(root + "/proc/self/cgroup")) {  // "4:cpu,cpuacct:/a/b"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !names(controllers, controller)) continue;
    const std::string group = line.substr(second + 1);
    const std::vector<Mount> mounts = mounts_of(controller, controllers.empty(), root);
    const size_t before = folders.size();
    for (const Mount& mount : mounts) {
      if (mount.shows(group)) mount.add_folders(group, &folders);
    }
    // A container may be told its host's name of its group, and have only that one mounted.
    if (folders.size() == before && !mounts.empty()) folders.push_back(mounts[0].folder);
  }
  return folders;
}

double cpu_quota(const std::string& root) {
  double quota = std::numeric_limits<double>::infinity();
  for (const std::string& folder : control_groups("cpu", root)) {
    const std::vector<std::string> both = split(first_line(folder + "/cpu.max"), ' ');
    if (both.size() == 2) quota = std::min(quota, cpus(both[0], both[1]));
    quota = std::min(quota, cpus(first_line(folder + "/cpu.cfs_quota_us"),
                                 first_line(folder + "/cpu.cfs_period_us")));
  }
  return quota;
}

}  // namespace codellama_rt
