package main

import (
	"net"
	"net/netip"
	"testing"

	"mailproxy/config"
)

func TestOwnAddresses(t *testing.T) {
	all, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	one, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	port := func(l net.Listener) string { _, p, _ := net.SplitHostPort(l.Addr().String()); return p }
	own := ownAddresses(&config.Local{Address: "192.0.2.11"}, []netip.AddrPort{netip.MustParseAddrPort("[::]:" + port(all)),
		netip.MustParseAddrPort("127.0.0.2:" + port(one))})
	for address, want := range map[string]bool{
		"127.0.0.1:" + port(all):  true,
		"[::1]:" + port(all):      true,
		"192.0.2.11:" + port(all): true, // behind a NAT this machine does not have it
		"192.0.2.12:" + port(all): false,
		"127.0.0.1:1":             false, // another server's
		"127.0.0.2:" + port(one):  true,
		"127.0.0.3:" + port(one):  false,
		"192.0.2.11:" + port(one): true,
	} {
		if got := own(netip.MustParseAddrPort(address)); got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
}
