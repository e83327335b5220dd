//! The machine a run came from, in one sentence.

/// Processor, kernel, memory: what a reader needs to judge figures.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(':').nth(1)).unwrap_or("").trim().to_owned()
    };
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let kib: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let virtual_machine = if field("flags").split_whitespace().any(|flag| flag == "hypervisor") {
        ", a virtual machine whose neighbours cannot be seen"
    } else {
        ""
    };
    let (name, family) = (field("model name"), field("cpu family"));
    let (model, cache) = (field("model\t"), field("cache size"));
    format!(
        "Machine: {count} CPUs, {name} (family {family}, model {model}, cache {cache}){virtual_machine}; \
         {} GiB of memory; Linux {kernel}.",
        kib.div_ceil(1 << 20)
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_sentence_names_the_kernel() {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
        assert!(super::machine().contains(kernel.trim()));
    }
}
