package main

import (
	"strings"
	"testing"
	"time"

	"mailproxy/cluster"
	"mailproxy/config"
)

func TestTableIsPMGs(t *testing.T) {
	node := func(cid config.CID, name, address string, role cluster.Role, state cluster.Relation) cluster.Row {
		return cluster.Row{State: state, NodeStatus: cluster.NodeStatus{CID: cid, Name: name, Address: address, Role: role, Load1: 0.3, MemoryPercent: 80,
			DiskPercent: 41, UptimeSeconds: 45*3600 + 18*60 + 59}}
	}
	gone := node(3, "pmg7", "192.168.2.129:7025", cluster.Slave, cluster.Unreachable)
	gone.Error, gone.Since = "no answer\nin 2s", time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	late := node(2, "pmg6", "192.168.2.128:7025", cluster.Slave, cluster.Behind)
	late.UptimeSeconds, late.Load1, late.MemoryPercent = 3*3600+7*60, -1, -1
	late.Problems = []cluster.Problem{{What: "something is wrong", Remedy: "put it right"}}
	late.Kept = 2
	var b strings.Builder
	if err := printTable(&b, cluster.Report{Rows: []cluster.Row{node(1, "pmg5", "192.168.2.127:7025", cluster.Master, cluster.InSync), late, gone}}); err != nil {
		t.Fatal(err)
	}
	want := `NAME(CID)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD----MEM---DISK
pmg5(1)              192.168.2.127   master A     1 day 21:18   0.30    80%    41%
pmg6(2)              192.168.2.128   node   S           03:07      -     -%    41%
pmg7(3)              192.168.2.129   node   ERROR: no answer in 2s, since 2026-01-02 03:04:05 UTC               -      -     -%     -%

pmg6(2): 2 queued items kept: refused by the next hop, and the sender may be forged, so nobody is told; each ends with its life
  remedy: ` + keptRemedy + `
pmg6(2): something is wrong
  remedy: put it right
`
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestUptime(t *testing.T) {
	for seconds, want := range map[int64]string{-1: "-", 0: "00:00", 59: "00:00", 3600: "01:00", 86400: "1 day 00:00", 2*86400 + 300: "2 days 00:05"} {
		if got := uptime(seconds); got != want {
			t.Errorf("uptime(%d) = %q, want %q", seconds, got, want)
		}
	}
}

func TestStateLetter(t *testing.T) {
	for state, want := range map[cluster.Relation]string{
		cluster.InSync: " A ", cluster.Behind: " S ", cluster.Drifted: " S ", cluster.Stale: " S ", cluster.Joining: " S ", cluster.Ahead: " S ",
	} {
		if got := tableRow(cluster.Row{State: state}); !strings.Contains(got, want) {
			t.Errorf("row of a node that is %s: %q, want%sin it", state, got, want)
		}
	}
}

func TestLongMarksWhatDiffers(t *testing.T) {
	ahead := int64(2500)
	r := cluster.Report{Asked: 1, Rows: []cluster.Row{{
		State: cluster.Behind, CommitsBehind: 3, PushAgeSeconds: 7, ClockMS: &ahead, VersionDiffers: true, ZoneDiffers: true,
		NodeStatus: cluster.NodeStatus{CID: 2, Name: "mx2", FQDN: "mx2.example.net", UUID: "u-u", Version: "0.9", Zone: "CET +0100",
			Position: config.Position{Epoch: config.Epoch{N: 1, Owner: 1}}, RebootRequired: true, Database: true},
	}, {
		State: cluster.Unreachable, Error: "no answer", Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		NodeStatus: cluster.NodeStatus{CID: 3, Name: "mx3", Position: config.Position{Epoch: config.Epoch{N: 1, Owner: 1}, Serial: 4}},
	}}}
	var plain, red strings.Builder
	if err := printLong(&plain, r, false); err != nil {
		t.Fatal(err)
	}
	if err := printLong(&red, r, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"state        behind, 3 commits behind\n", "last push    7 s ago\n", "fqdn         mx2.example.net\n", "uuid         u-u\n",
		"version      0.9 (differs from node 1)\n", "zone         CET +0100 (differs from node 1)\n", ", clock +2.500 s\n", "reboot       required\n",
		"digest       000000000000\n", "last seen    now\n", "error        no answer\n", "last seen    2026-01-02 03:04:05 UTC\n", "(last known)\n",
	} {
		if !strings.Contains(plain.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, plain.String())
		}
	}
	if want := "\x1b[31m0.9 (differs from node 1)\x1b[0m"; !strings.Contains(red.String(), want) || strings.Contains(plain.String(), "\x1b") {
		t.Errorf("on a terminal:\n%q\nelsewhere:\n%q", red.String(), plain.String())
	}
}

func TestSpan(t *testing.T) {
	for seconds, want := range map[int64]string{0: "0 s", 119: "119 s", 120: "2 min", 7200: "2 h", 172800: "2 days"} {
		if got := span(seconds); got != want {
			t.Errorf("span(%d) = %q, want %q", seconds, got, want)
		}
	}
}
