package main

import (
	"strings"
	"testing"
	"time"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/tunnel"
)

// The ranges are those of the Monitoring Plugins guidelines' own table.
func TestThreshold(t *testing.T) {
	for _, c := range []struct {
		text     string
		quiet    []float64
		alerting []float64
	}{
		{"10", []float64{0, 10}, []float64{-1, 11}},
		{"10:", []float64{10, 1e9}, []float64{9, -5}},
		{"~:10", []float64{-1e9, 10}, []float64{11}},
		{"10:20", []float64{10, 20}, []float64{9, 21}},
		{"@10:20", []float64{9, 21}, []float64{10, 20}},
		{"0", []float64{0}, []float64{1}},
	} {
		r, err := parseThreshold(c.text)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range c.quiet {
			if r.alerts(v) {
				t.Errorf("%s alerts for %v", c.text, v)
			}
		}
		for _, v := range c.alerting {
			if !r.alerts(v) {
				t.Errorf("%s does not alert for %v", c.text, v)
			}
		}
	}
	for _, bad := range []string{"", "x", "20:10", "@", "1:2:3", "nan", "inf", "10%"} {
		if _, err := parseThreshold(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func defaults(t *testing.T, warning, critical string) limits {
	t.Helper()
	w, err := parseThreshold(warning)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseThreshold(critical)
	if err != nil {
		t.Fatal(err)
	}
	return limits{w, c}
}

func TestJudgeCluster(t *testing.T) {
	node := func(cid config.CID, role cluster.Role, state cluster.Relation) cluster.Row {
		return cluster.Row{NodeStatus: cluster.NodeStatus{CID: cid, Name: "mx", Role: role}, State: state}
	}
	master, good, bad := node(1, cluster.Master, cluster.InSync), node(2, cluster.Slave, cluster.InSync), node(3, cluster.Slave, cluster.Behind)
	bad.CommitsBehind = 4
	dead := node(1, cluster.Master, cluster.Unreachable)
	dead.Error = "gone"
	odd := good
	odd.Problems = []cluster.Problem{{What: "a | b"}, {What: "c"}}
	keeps := good
	keeps.Kept = 3
	for _, c := range []struct {
		name string
		rows []cluster.Row
		want level
		text string
	}{
		{"all well", []cluster.Row{master, good}, levelOK, "2 of 2 nodes in sync, master mx(1)"},
		{"one behind", []cluster.Row{master, good, bad}, levelWarning, "2 of 3 nodes in sync: mx(3) behind, master mx(1)"},
		{"two behind", []cluster.Row{master, bad, bad}, levelCritical, "1 of 3"},
		{"no master", []cluster.Row{dead, good, good}, levelCritical, "no master answers, 2 of 3"},
		{"mail is kept, which is nothing wrong", []cluster.Row{master, keeps}, levelOK, "2 of 2 nodes in sync, master mx(1); 3 queued items kept"},
		{"something is wrong", []cluster.Row{master, odd}, levelWarning, "; mx(2): a | b; mx(2): c"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := judgeCluster(cluster.Report{Rows: c.rows}, defaults(t, "0", "1"))
			if r.level != c.want || !strings.Contains(r.text, c.text) || len(r.perf) != 3 {
				t.Errorf("got %v %q %q, want %v %q", r.level, r.text, r.perf, c.want, c.text)
			}
		})
	}
}

// Kept mail is named, and warned of only where somebody says how much is too much.
func TestJudgeQueue(t *testing.T) {
	for _, c := range []struct {
		name, kept string
		waiting    cluster.Waiting
		want       level
		text, perf string
	}{
		{"nothing kept", "~:", cluster.Waiting{Items: 3}, levelOK, "3 items, the oldest since 0 s", "kept=0;;;0"},
		{"some kept", "~:", cluster.Waiting{Items: 3, Kept: 2}, levelOK, "; 2 kept: refused, and nobody told (`mailproxy queue list --kept`)", "kept=2;;;0"},
		{"as many as may be", "2", cluster.Waiting{Items: 3, Kept: 2}, levelOK, "; 2 kept: ", "kept=2;2;;0"},
		{"too many kept", "1", cluster.Waiting{Items: 3, Kept: 2}, levelWarning, "; 2 kept: ", "kept=2;1;;0"},
		{"too many items, too many kept", "1", cluster.Waiting{Items: 3000, Kept: 2}, levelCritical, "; 2 kept: ", "kept=2;1;;0"},
	} {
		bound, err := parseThreshold(c.kept)
		if err != nil {
			t.Fatal(err)
		}
		r := judgeQueue(c.waiting, defaults(t, "500", "2000"), bound)
		if r.level != c.want || !strings.Contains(r.text, c.text) || len(r.perf) != 3 || r.perf[2] != c.perf {
			t.Errorf("%s: got %v %q %q", c.name, r.level, r.text, r.perf)
		}
	}
}

func TestJudgeCertificates(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	node := func(cid config.CID, days int) cluster.Row {
		return cluster.Row{NodeStatus: cluster.NodeStatus{CID: cid, Name: "mx", Certificate: &tunnel.Certificate{Expires: now.AddDate(0, 0, days)}}}
	}
	for days, want := range map[int]level{100: levelOK, 30: levelOK, 29: levelWarning, 6: levelCritical, -1: levelCritical} {
		r, err := judgeCertificates(cluster.Report{At: now, Rows: []cluster.Row{node(1, 300), node(2, days), {}}}, defaults(t, "30:", "7:"))
		if err != nil || r.level != want || !strings.Contains(r.text, "mx(2) is the first to end") || !strings.Contains(r.text, "2 of 3 nodes") {
			t.Errorf("%d days: %v %q %v, want %v", days, r.level, r.text, err, want)
		}
	}
	if _, err := judgeCertificates(cluster.Report{Rows: []cluster.Row{{}}}, limits{}); err == nil {
		t.Error("no certificate is known, and it is judged")
	}
}
