package secret

import "crypto/ed25519"

// A Box is some secrets as they are stored, with what one node opens them by. It tells nothing to whoever has not that node's key.
type Box struct {
	Wraps  []Wrap   `json:"wraps"`
	Sealed []Sealed `json:"sealed"`
}

// A Sealed is one secret.
type Sealed struct {
	Name string `json:"name"`
	// KeyID is the data key's.
	KeyID string `json:"key_id"`
	Value []byte `json:"value"`
}

// Open gives those secrets that open with a node's key, by name, and the first error of those that do not.
func (b *Box) Open(own ed25519.PrivateKey) (map[string][]byte, error) {
	values := make(map[string][]byte, len(b.Sealed))
	if len(b.Sealed) == 0 {
		return values, nil
	}
	key, err := Unwrap(b.Wraps, own)
	if err != nil {
		return values, err
	}
	var first error
	for _, s := range b.Sealed {
		value, err := key.Open(s.Name, s.Value)
		if err == nil {
			values[s.Name] = value
		} else if first == nil {
			first = err
		}
	}
	return values, first
}
