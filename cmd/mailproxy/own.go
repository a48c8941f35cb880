package main

import (
	"net"
	"net/netip"

	"mailproxy/config"
)

// listening gives where the node takes mail.
func (o *listeners) listening() (all []netip.AddrPort) {
	for _, l := range o.smtp {
		if a, err := netip.ParseAddrPort(l.Addr().String()); err == nil {
			all = append(all, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
		}
	}
	return all
}

// ownAddresses says whether this node takes mail at an address: one of this machine's, or the one by which the other nodes know it, at the
// port of one of its listeners.
func ownAddresses(local *config.Local, listening []netip.AddrPort) func(netip.AddrPort) bool {
	known, _ := netip.ParseAddr(local.Address) // a host name is not looked up: the resolver may ask for this very mail
	return func(to netip.AddrPort) bool {
		for _, l := range listening {
			if l.Port() != to.Port() {
				continue
			}
			if to.Addr() == l.Addr() || to.Addr() == known || l.Addr().IsUnspecified() && isLocal(to.Addr()) {
				return true
			}
		}
		return false
	}
}

// isLocal says whether this machine has the address now.
func isLocal(a netip.Addr) bool {
	if a.IsLoopback() || a.IsUnspecified() {
		return true
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, x := range all {
		if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().WithZone("") == a.Unmap().WithZone("") {
			return true
		}
	}
	return false
}
