package secret

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"slices"
	"testing"
)

func newKey(t *testing.T) (ed25519.PrivateKey, string) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return private, PublicText(public)
}

func TestWhatIsSealedOpensUnderItsNameAndKeyAlone(t *testing.T) {
	k := NewDataKey()
	for _, value := range [][]byte{[]byte("hunter2"), {0, 1, 2, 255, '\n'}, {}} {
		sealed := k.Seal("dkim", value)
		if len(value) > 0 && bytes.Contains(sealed, value) {
			t.Errorf("%q is in %x", value, sealed)
		}
		if got, err := k.Open("dkim", sealed); err != nil || !bytes.Equal(got, value) {
			t.Errorf("%q, %v, want %q", got, err, value)
		}
		if again := k.Seal("dkim", value); bytes.Equal(again, sealed) {
			t.Error("the same value is sealed to the same bytes")
		}
		for what, open := range map[string]func() ([]byte, error){
			"another name":     func() ([]byte, error) { return k.Open("smtp", sealed) },
			"another data key": func() ([]byte, error) { return NewDataKey().Open("dkim", sealed) },
			"a bit turned":     func() ([]byte, error) { b := slices.Clone(sealed); b[len(b)-1] ^= 1; return k.Open("dkim", b) },
			"another nonce":    func() ([]byte, error) { b := slices.Clone(sealed); b[0] ^= 1; return k.Open("dkim", b) },
			"cut off":          func() ([]byte, error) { return k.Open("dkim", sealed[:len(sealed)-1]) },
			"a stump":          func() ([]byte, error) { return k.Open("dkim", sealed[:7]) },
			"nothing":          func() ([]byte, error) { return k.Open("dkim", nil) },
		} {
			if got, err := open(); !errors.Is(err, ErrSealed) || got != nil {
				t.Errorf("%s: %q, %v, want ErrSealed", what, got, err)
			}
		}
	}
}

func TestADataKeyIsUnwrappedByWhomItIsWrappedFor(t *testing.T) {
	one, oneText := newKey(t)
	two, twoText := newKey(t)
	three, _ := newKey(t)
	k := NewDataKey()
	var wraps []Wrap
	for _, text := range []string{oneText, twoText} {
		w, err := k.WrapFor(text)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(w.Wrapped, k.key[:]) {
			t.Error("the data key is in its wrap")
		}
		wraps = append(wraps, w)
	}
	for _, own := range []ed25519.PrivateKey{one, two} {
		if got, err := Unwrap(wraps, own); err != nil || got != k {
			t.Errorf("%v, want the data key", err)
		}
	}
	stolen := slices.Clone(wraps)
	stolen[0].Wrapped = wraps[1].Wrapped
	cut := slices.Clone(wraps)
	cut[0].Wrapped = cut[0].Wrapped[:len(cut[0].Wrapped)-1]
	renamed := slices.Clone(wraps)
	renamed[0].KeyID = NewDataKey().ID()
	for what, c := range map[string]struct {
		wraps []Wrap
		own   ed25519.PrivateKey
	}{
		"no node of these": {wraps, three}, "none": {nil, one}, "another's wrap": {stolen, one}, "cut off": {cut, one},
		"under another data key's name": {renamed, one},
	} {
		if got, err := Unwrap(c.wraps, c.own); !errors.Is(err, ErrNotEntitled) || got != (DataKey{}) {
			t.Errorf("%s: %v, want ErrNotEntitled", what, err)
		}
	}
	for _, bad := range []string{"", "ssh-ed25519 key1", "ssh-rsa x"} {
		if _, err := k.WrapFor(bad); err == nil {
			t.Errorf("wrapped for %q", bad)
		}
	}
}
