//! What the system tells of memory; nothing where it does not.

fn field(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

/// The largest memory that this process has had so far, in bytes.
pub fn peak() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Memory of the machine, in bytes.
pub fn total() -> Option<u64> {
    field("/proc/meminfo", "MemTotal:")
}

/// Memory that this program could still take without others going to disk, or beyond the limit that its group has, in bytes.
pub fn available() -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = number("memory.max").map(|most| most.saturating_sub(number("memory.current").unwrap_or(0)));
    let system = field("/proc/meminfo", "MemAvailable:");
    system.into_iter().chain(group).min()
}
