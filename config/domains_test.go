package config

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// Through any changes the list has what a plain slice has, and what it was before stays as it was.
func TestDomainsAreAListThatIsSorted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		some := rapid.SliceOfN(rapid.IntRange(0, 3*pieceSize), 0, 4*pieceSize)
		name := func(i int) string { return fmt.Sprintf("d%04d.test", i) }
		want := map[string]Domain{}
		for _, i := range some.Draw(t, "first") {
			want[name(i)] = Domain{Name: name(i)}
		}
		d := NewDomains(values(want)) // in any order
		for round := range rapid.IntRange(0, 4).Draw(t, "rounds") {
			before := d
			list := d.List()
			changes := map[string]*Domain{}
			for _, i := range some.Draw(t, "changed") {
				changes[name(i)] = nil
				if delete(want, name(i)); rapid.Bool().Draw(t, "put") {
					want[name(i)] = Domain{Name: name(i), Comment: fmt.Sprint(round)}
					changes[name(i)] = &Domain{Name: name(i), Comment: fmt.Sprint(round)}
				}
			}
			d = d.Patch(changes)
			if diff := cmp.Diff(list, before.List()); diff != "" {
				t.Fatal("the list before was changed: ", diff)
			}
		}
		list := values(want)
		slices.SortFunc(list, compareDomains)
		if diff := cmp.Diff(list, d.List()); diff != "" || d.Len() != len(list) {
			t.Fatalf("%d domains, want %d: %s", d.Len(), len(list), diff)
		}
		for i := range 3*pieceSize + 1 {
			x, there := want[name(i)]
			if got := d.Get(name(i)); there != (got != nil) || there && !cmp.Equal(*got, x) {
				t.Fatalf("%s: %v, want %v, %v", name(i), got, x, there)
			}
		}
	})
}

func values(m map[string]Domain) []Domain {
	list := []Domain{}
	for _, d := range m {
		list = append(list, d)
	}
	return list
}

func TestDomainsKeepNothingOfTheListThatTheyAreMadeOf(t *testing.T) {
	for _, given := range [][]string{{"a.test", "b.test"}, {"b.test", "a.test"}} {
		list := []Domain{{Name: given[0]}, {Name: given[1]}}
		d := NewDomains(list)
		if list[0].Name != given[0] {
			t.Errorf("%v was sorted itself", given)
		}
		list[0].Name, list[1].Name = "x.test", "x.test"
		if d.Get("a.test") == nil || d.Get("b.test") == nil {
			t.Errorf("%v: they changed with it: %v", given, d.List())
		}
	}
}

// One after the other, as an administrator adds them.
func TestPiecesStaySmall(t *testing.T) {
	var d Domains
	for x := range manyDomains(5 * pieceSize).All() {
		d = d.Patch(map[string]*Domain{x.Name: x})
		for _, p := range d.pieces {
			if len(p) > 2*pieceSize {
				t.Fatalf("one of %d domains", len(p))
			}
		}
	}
	if d.Len() != 5*pieceSize {
		t.Errorf("%d domains", d.Len())
	}
}

// What is not changed is not copied.
func TestAPatchSharesAllButOnePiece(t *testing.T) {
	const n = 100 * pieceSize
	d := manyDomains(n)
	middle := fmt.Sprintf("d%06d.example.test", n/2)
	for what, to := range map[string]*Domain{"changed": {Name: middle}, "taken away": nil} {
		after := d.Patch(map[string]*Domain{middle: to})
		fresh := 0
		for _, shared := range after.besides(d) {
			if !shared {
				fresh++
			}
		}
		if fresh != 1 || len(after.pieces) != 100 {
			t.Errorf("%s: %d of %d pieces are new, want 1 of 100", what, fresh, len(after.pieces))
		}
	}
	patch := testing.AllocsPerRun(10, func() { d.Patch(map[string]*Domain{middle: nil}) })
	if patch > 10 {
		t.Errorf("%v allocations", patch)
	}
}

func TestDomainsAreAPlainListInJSON(t *testing.T) {
	for text, d := range map[string]Domains{
		`{"domains":[]}`: {},
		`{"domains":[{"name":"a.test","hosts":["a:25"]},{"name":"b.test","transport":"t"}]}`: NewDomains([]Domain{
			{Name: "b.test", Transport: "t"}, {Name: "a.test", Hosts: []string{"a:25"}}}),
	} {
		type file struct {
			Domains Domains `json:"domains"`
		}
		got, err := json.Marshal(file{d})
		if err != nil || string(got) != text {
			t.Errorf("%s, %v, want %s", got, err, text)
		}
		var back file
		if err := json.Unmarshal([]byte(text), &back); err != nil || !cmp.Equal(back.Domains.List(), d.List()) {
			t.Errorf("%s is read as %v, %v", text, back.Domains.List(), err)
		}
	}
	if err := json.Unmarshal([]byte(`{"domains":[1]}`), new(Snapshot)); err == nil || !strings.Contains(err.Error(), "Domain") {
		t.Errorf("what is no list of domains: %v", err)
	}
	if text, err := json.Marshal(new(Snapshot)); err != nil || strings.Contains(string(text), "domains") {
		t.Errorf("without any: %s, %v", text, err)
	}
}
