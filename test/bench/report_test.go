package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for name, c := range map[string]struct {
		values []float64
		want   float64
	}{
		"the one in the middle, in any order":            {[]float64{9, 1, 2}, 2},
		"between the two in the middle of an even count": {[]float64{4, 1, 2, 9}, 3},
		"a single one": {[]float64{7}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			if got := median(c.values); got != c.want {
				t.Errorf("median(%v) = %v, want %v", c.values, got, c.want)
			}
		})
	}
}

func TestPercentileIsANearestRank(t *testing.T) {
	var values []float64 // 200 down to 1
	for i := 200; i > 0; i-- {
		values = append(values, float64(i))
	}
	for p, want := range map[float64]float64{50: 100, 99: 198, 99.5: 199, 100: 200, 0: 1} {
		if got := percentile(values, p); got != want {
			t.Errorf("percentile(1..200, %v) = %v, want %v", p, got, want)
		}
	}
}

func TestRatiosAreOfTheSameRound(t *testing.T) {
	got := ratios([]float64{4, 9, 5}, []float64{2, 3, 10})
	if want := []float64{2, 3, 0.5}; !slices.Equal(got, want) {
		t.Errorf("ratios = %v, want %v", got, want)
	}
}

func TestGoal(t *testing.T) {
	for name, c := range map[string]struct {
		goal          goal
		value         float64
		text, verdict string
	}{
		"a lower bound is kept by itself":      {atLeast(2), 2, ">= 2", "yes"},
		"a lower bound is missed":              {atLeast(0.6), 0.59, ">= 0.6", "NO"},
		"an upper bound is not kept by itself": {below(250), 250, "< 250", "NO"},
		"an upper bound is kept":               {below(40), 39.9, "< 40", "yes"},
		"without a goal nothing is said":       {goal{}, 1, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := c.goal.String(); got != c.text {
				t.Errorf("text %q, want %q", got, c.text)
			}
			if got := c.goal.verdict(c.value); got != c.verdict {
				t.Errorf("verdict %q, want %q", got, c.verdict)
			}
		})
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{8431.4: "8431", 57.34: "57.3", 1.944: "1.94", 0.6: "0.6", 2: "2", -3.456: "-3.46"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestBenchOnlyLeavesMeasurementsIn(t *testing.T) {
	for only, want := range map[string][]string{
		"": {
			"memory", "memory.bodies", "smtp.latency", "smtp.cutthrough", "smtp.flat", "smtp.spool", "smtp.drain", "cluster", "cluster.commit_to_slave.rtt100", "cluster.handover_ms",
			"cluster.forced_promote_ms", "cluster.away_10000_commits_s", "cluster.16", "cluster.full_sync_1m",
		},
		"smtp":                 {"smtp.latency", "smtp.cutthrough", "smtp.flat", "smtp.spool", "smtp.drain"},
		"smtp.spool":           {"smtp.spool"},
		"smtp.cutthrough.kept": {"smtp.cutthrough"},
		"memory.idle_mb":       {"memory"},
		"cluster.commit_to":    {"cluster", "cluster.commit_to_slave.rtt100"},
		"cluster.handover_ms":  {"cluster.handover_ms"},
		"cluster.16":           {"cluster.16"},
		"cluster.16.cpu":       {"cluster.16"},
		"cluster.commit.p50":   {"cluster"},
		"nothing":              nil,
	} {
		var got []string
		for _, m := range measurements() {
			if wanted(m.prefix, only) {
				got = append(got, m.prefix)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("BENCH_ONLY=%s runs %v, want %v", only, got, want)
		}
	}
}

func TestReportHoldsWhatBenchOnlyNames(t *testing.T) {
	b := &bench{results: []result{
		{Name: "smtp.cutthrough.kept.vs_postfix", Value: 2.34567, Goal: atLeast(2), Rounds: []float64{2, 2.34567, 3}},
		{Name: "smtp.cutthrough.new.vs_postfix", Value: 1.5, Goal: atLeast(2)},
	}}
	table := b.table("smtp.cutthrough.kept")
	for _, want := range []string{"smtp.cutthrough.kept.vs_postfix", "2.35", ">= 2", "yes", "2 2.35 3"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in the table:\n%s", want, table)
		}
	}
	if strings.Contains(table, "new") {
		t.Errorf("the table holds what BENCH_ONLY does not name:\n%s", table)
	}
	file := filepath.Join(t.TempDir(), "results")
	if err := b.writeJSON(file, ""); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	var first map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &first); err != nil || len(lines) != 2 {
		t.Fatalf("not two JSON lines: %v\n%s", err, text)
	}
	if len(first) != 2 || first["name"] != "smtp.cutthrough.kept.vs_postfix" || first["value"] != 2.346 {
		t.Errorf("first line %s, want its name and value 2.346 and no more", lines[0])
	}
}

func TestTheKernelsTablesAreRead(t *testing.T) {
	stat := "4711 (mail (p) y) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 9 0 100 200 300"
	if got, err := ticksOf(stat); got != 300 || err != nil {
		t.Errorf("ticks of %q: %d, %v; want 300", stat, got, err)
	}
	dev := "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n  eth0: 1 2 3\n    lo: 12345 67 0 0 0 0 0 0 12345 67\n"
	if got, err := bytesOf(dev); got != 12345 || err != nil {
		t.Errorf("bytes of lo: %d, %v; want 12345", got, err)
	}
	if _, err := ticksOf("4711 (x) S"); err == nil {
		t.Error("half a stat line is read")
	}
	if _, err := bytesOf("eth0: 1 2"); err == nil {
		t.Error("no lo is no error")
	}
}
