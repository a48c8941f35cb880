package lab

import (
	"fmt"
	"os/exec"
	"strings"
)

// The network of a lab. Hosts have addresses from firstHost up.
const (
	bridge     = "lab"
	HubAddress = "10.99.0.1" // this process's own
	prefix     = "/16"
	// everyHost is all addresses but the hub's.
	everyHost = "10.99.1.0-10.99.255.254"
)

// hostAddress gives the address of the host that was made as number i, from 0.
func hostAddress(i int) string { return fmt.Sprintf("10.99.%d.%d", 1+i/200, 11+i%200) }

// command runs a program; what it says is in the error.
func command(name string, args ...string) error { return feed("", name, args...) }

// feed is command with an input.
func feed(input, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ip carries out lines of ip(8).
func ip(lines string) error { return feed(lines, "ip", "-batch", "-") }

// outer is the end of the host's cable that is in the hub.
func (h *Host) outer() string { return "v-" + h.ID }

// plug makes the host's namespace and its cable to the bridge. No MAC addresses are learned from IPv6, which is not used here.
func (h *Host) plug() error {
	if err := ip(fmt.Sprintf("netns add %[1]s\nlink add %[2]s type veth peer name eth0 netns %[1]s\nlink set %[2]s master %[3]s addrgenmode none up\n",
		h.ID, h.outer(), bridge)); err != nil {
		return err
	}
	if err := feed(fmt.Sprintf("addr add %s%s dev eth0\nlink set lo up\nlink set eth0 addrgenmode none up\nroute add default via %s\n",
		h.Address, prefix, HubAddress), "ip", "-n", h.ID, "-batch", "-"); err != nil {
		return err
	}
	return h.nft(`table inet lab {
		set cut { type ipv4_addr; flags interval; }
		chain in { type filter hook input priority 0; ip saddr @cut drop; }
		chain out { type filter hook output priority 0; ip daddr @cut drop; }
	}`)
}

// unplug removes both ends; the processes of the host are gone.
func (h *Host) unplug() error {
	_ = command("ip", "link", "del", h.outer()) // gone with a namespace that is half removed
	return command("ip", "netns", "del", h.ID)
}

// Thin bounds what the host says and hears, each, by a rate as tc(8) has it, "10mbit"; "" ends it.
func (h *Host) Thin(rate string) error {
	outer := []string{"tc", "qdisc"}
	inner := append([]string{"ip", "netns", "exec", h.ID}, outer...)
	for device, tc := range map[string][]string{h.outer(): outer, "eth0": inner} {
		_ = command(tc[0], append(tc[1:len(tc):len(tc)], "del", "dev", device, "root")...) // where it is thin already
		if rate == "" {
			continue
		}
		what := []string{"add", "dev", device, "root", "tbf", "rate", rate, "burst", "16kb", "latency", "200ms"}
		if err := command(tc[0], append(tc[1:len(tc):len(tc)], what...)...); err != nil {
			return err
		}
	}
	return nil
}

// nft carries out commands of nft(8) in the host.
func (h *Host) nft(commands string) error {
	return feed(commands, "ip", "netns", "exec", h.ID, "nft", "-f", "-")
}

// dropPackets makes the host's rules say what it is cut off from.
func (h *Host) dropPackets() error {
	var addresses []string
	if h.Isolated {
		addresses = append(addresses, everyHost)
	} else {
		for _, id := range h.CutFrom {
			if other, err := h.lab.Host(id); err == nil {
				addresses = append(addresses, other.Address)
			}
		}
	}
	rules := "flush set inet lab cut\n"
	if len(addresses) > 0 {
		rules += fmt.Sprintf("add element inet lab cut { %s }\n", strings.Join(addresses, ", "))
	}
	return h.nft(rules)
}
