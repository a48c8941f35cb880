package cluster

import (
	"strings"
	"testing"

	"mailproxy/config"
)

func TestATunnelThatIsNotWhatTheSettingWantsIsNamed(t *testing.T) {
	mx2 := Peer{CID: 2, Name: "mx2", Address: "192.0.2.12:7025", Tunnel: true, Transport: config.TunnelSSH}
	if got := fallbacks([]Peer{mx2}); len(got) != 0 {
		t.Errorf("one that is right is named: %v", got)
	}
	mx2.Fallback = "no answer"
	for kind, want := range map[config.TunnelKind]Problem{
		config.TunnelSSH:       {"the tunnel to mx2(2) is SSH without WireGuard around it: no answer", "let UDP through to port 7025"},
		config.TunnelWireGuard: {"the tunnel to mx2(2) is still WireGuard: no answer", "let TCP through to port 7025"},
	} {
		mx2.Transport = kind
		got := fallbacks([]Peer{mx2})
		if len(got) != 1 || got[0].What != want.What || !strings.HasPrefix(got[0].Remedy, want.Remedy) {
			t.Errorf("%s: %v", kind, got)
		}
	}
}
