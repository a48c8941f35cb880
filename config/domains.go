package config

import (
	"cmp"
	"encoding/json"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Domains is a list of domains, sorted by name, as a value that is never changed. Patch makes another, which shares with the old one
// every piece in which nothing changed: so a change among 100,000 domains costs one piece, to make and to check (ValidateAfter). In JSON
// it is a plain list. Two domains of one name are for Validate to find.
type Domains struct {
	pieces [][]Domain // none is empty, each in memory of its own
	count  int
}

// pieceSize is how long a piece is made, and half of how long it may become. Of 100,000 domains a change copies one piece and 400
// references to others, 20 kB and 10.
const pieceSize = 256

// NewDomains makes a list of domains in any order. It keeps no reference to list.
func NewDomains(list []Domain) Domains {
	if !slices.IsSortedFunc(list, compareDomains) {
		list = slices.Clone(list)
		slices.SortStableFunc(list, compareDomains)
	}
	var d Domains
	d.add(list)
	return d
}

func compareDomains(a, b Domain) int { return cmp.Compare(a.Name, b.Name) }

// add puts domains behind the others, in new pieces.
func (d *Domains) add(list []Domain) {
	for piece := range slices.Chunk(list, pieceSize) {
		d.pieces = append(d.pieces, slices.Clone(piece))
	}
	d.count += len(list)
}

// Len is how many there are.
func (d Domains) Len() int { return d.count }

// All gives each of them, by name, not to be changed.
func (d Domains) All() iter.Seq[*Domain] {
	return func(yield func(*Domain) bool) {
		for _, piece := range d.pieces {
			for i := range piece {
				if !yield(&piece[i]) {
					return
				}
			}
		}
	}
}

// List gives a copy as a plain slice, which is never nil.
func (d Domains) List() []Domain {
	list := make([]Domain, 0, d.count)
	for _, piece := range d.pieces {
		list = append(list, piece...)
	}
	return list
}

// Get gives the domain of a name, not to be changed; nil where it is not there.
func (d Domains) Get(name string) *Domain {
	at, found := slices.BinarySearchFunc(d.pieces, name, func(p []Domain, name string) int { return strings.Compare(p[0].Name, name) })
	if !found { // in the piece that begins before it
		at--
	}
	if at < 0 {
		return nil
	}
	piece := d.pieces[at]
	if at, found = findDomain(piece, name); !found {
		return nil
	}
	return &piece[at]
}

func findDomain(piece []Domain, name string) (at int, found bool) {
	return slices.BinarySearchFunc(piece, name, func(d Domain, name string) int { return strings.Compare(d.Name, name) })
}

// Patch gives the list with some domains changed, by their names: to what there is for the name, or, where that is nil, taken away.
func (d Domains) Patch(changes map[string]*Domain) Domains {
	names := slices.Sorted(maps.Keys(changes))
	old := d.pieces
	if len(old) == 0 {
		old = [][]Domain{nil}
	}
	n := Domains{pieces: make([][]Domain, 0, len(old)+1)}
	for i, piece := range old {
		here := len(names)
		if i+1 < len(old) {
			here, _ = slices.BinarySearch(names, old[i+1][0].Name)
		}
		if here > 0 {
			piece = patchPiece(piece, names[:here], changes)
			names = names[here:]
		}
		switch {
		case len(piece) > 2*pieceSize:
			n.add(piece)
		case len(piece) > 0:
			n.pieces = append(n.pieces, piece)
			n.count += len(piece)
		}
	}
	return n
}

// patchPiece makes a new piece of an old one and the changes of the names given, which are sorted.
func patchPiece(old []Domain, names []string, changes map[string]*Domain) []Domain {
	piece := make([]Domain, 0, len(old)+len(names))
	for _, name := range names {
		at, found := findDomain(old, name)
		piece = append(piece, old[:at]...)
		if old = old[at:]; found {
			old = old[1:]
		}
		if change := changes[name]; change != nil {
			piece = append(piece, *change)
		}
	}
	return append(piece, old...)
}

// besides gives each piece, and whether other has the very same.
func (d Domains) besides(other Domains) iter.Seq2[[]Domain, bool] {
	return func(yield func([]Domain, bool) bool) {
		rest := other.pieces
		for _, piece := range d.pieces {
			for len(rest) > 0 && rest[0][0].Name < piece[0].Name {
				rest = rest[1:]
			}
			if !yield(piece, len(rest) > 0 && sameMemory(rest[0], piece)) {
				return
			}
		}
	}
}

// missing gives the names that other lacks.
func (d Domains) missing(other Domains) map[string]bool {
	names := map[string]bool{}
	for piece, there := range d.besides(other) {
		if there {
			continue
		}
		for i := range piece {
			if other.Get(piece[i].Name) == nil {
				names[piece[i].Name] = true
			}
		}
	}
	return names
}

// sameMemory says whether two slices are one.
func sameMemory[T any](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// MarshalJSON gives a list.
func (d Domains) MarshalJSON() ([]byte, error) { return json.Marshal(d.List()) }

// UnmarshalJSON reads a list.
func (d *Domains) UnmarshalJSON(data []byte) error {
	var list []Domain
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	*d = NewDomains(list)
	return nil
}
