package cluster

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hostLoad is what the table of `pmgcm status` shows of a host. What cannot be read is negative.
type hostLoad struct {
	uptime       time.Duration
	load1        float64
	memory, disk float64 // percent in use
}

// readHost reads the host's figures; disk is that of dir's file system.
func readHost(dir string) hostLoad {
	return hostLoad{
		uptime: time.Duration(firstNumber("/proc/uptime") * float64(time.Second)),
		load1:  firstNumber("/proc/loadavg"), memory: memoryUsed("/proc/meminfo"), disk: diskUsed(dir),
	}
}

// rebootFlag is what Debian's packages make when the running host is older than what is installed.
const rebootFlag = "/run/reboot-required"

func rebootRequired() bool {
	_, err := os.Stat(rebootFlag)
	return err == nil
}

// fqdn is the host's name with its domain, as hosts(5) has it; the bare host name where it does not.
func fqdn() string {
	name, err := os.Hostname()
	if err != nil || strings.Contains(name, ".") {
		return name
	}
	b, err := os.ReadFile("/etc/hosts")
	if err != nil {
		return name
	}
	return canonical(string(b), name)
}

// canonical finds name in a hosts(5) text and gives the first name of its line.
func canonical(hosts, name string) string {
	for line := range strings.Lines(hosts) {
		line, _, _ = strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) > 1 && slices.Contains(f[1:], name) {
			return f[1]
		}
	}
	return name
}

// firstNumber reads the first word of a small file.
func firstNumber(file string) float64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return -1
	}
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return -1
	}
	v, err := strconv.ParseFloat(f[0], 64)
	if err != nil {
		return -1
	}
	return v
}

// memoryUsed is the share of memory that is not available, as proc(5) has it in meminfo.
func memoryUsed(file string) float64 {
	f, err := os.Open(file)
	if err != nil {
		return -1
	}
	defer func() { _ = f.Close() }()
	total, available := 0.0, -1.0
	for s := bufio.NewScanner(f); s.Scan(); {
		w := strings.Fields(s.Text())
		if len(w) < 2 {
			continue
		}
		v, err := strconv.ParseFloat(w[1], 64)
		if err != nil {
			continue
		}
		switch w[0] {
		case "MemTotal:":
			total = v
		case "MemAvailable:":
			available = v
		}
	}
	if total <= 0 || available < 0 {
		return -1
	}
	return 100 * (total - available) / total
}

// diskUsed is the share in use of what unprivileged users may use, as df(1) counts.
func diskUsed(dir string) float64 {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil {
		return -1
	}
	used := float64(s.Blocks - s.Bfree)
	if used+float64(s.Bavail) == 0 {
		return -1
	}
	return 100 * used / (used + float64(s.Bavail))
}
