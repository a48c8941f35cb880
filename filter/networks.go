package filter

import (
	"net/netip"
	"slices"

	"mailproxy/config"
)

// networks finds the prefix that an address is in with one look-up for each length that occurs.
type networks struct {
	set    map[netip.Prefix]struct{}
	v4, v6 []int // the lengths that occur
}

func compileNetworks(rows []config.Network) (networks, error) {
	n := networks{set: make(map[netip.Prefix]struct{}, len(rows))}
	for _, row := range rows {
		if !row.Prefix.IsValid() {
			return n, &CompileError{"network " + row.Prefix.String(), "is not a network"}
		}
		n.add(row.Prefix)
	}
	return n, nil
}

// networksOf makes them of prefixes that are valid.
func networksOf(prefixes []netip.Prefix) networks {
	n := networks{set: make(map[netip.Prefix]struct{}, len(prefixes))}
	for _, p := range prefixes {
		n.add(p)
	}
	return n
}

func (n *networks) add(p netip.Prefix) {
	lengths := &n.v6
	if p.Addr().Is4() {
		lengths = &n.v4
	}
	if !slices.Contains(*lengths, p.Bits()) {
		*lengths = append(*lengths, p.Bits())
	}
	n.set[p.Masked()] = struct{}{}
}

func (n *networks) has(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	lengths := n.v6
	if a.Is4() {
		lengths = n.v4
	}
	for _, bits := range lengths {
		if p, err := a.Prefix(bits); err == nil {
			if _, ok := n.set[p]; ok {
				return true
			}
		}
	}
	return false
}
