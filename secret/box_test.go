package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
)

func TestABoxOpensWithTheNodesKeyAlone(t *testing.T) {
	own, ownText := newKey(t)
	other, _ := newKey(t)
	k := NewDataKey()
	w, err := k.WrapFor(ownText)
	if err != nil {
		t.Fatal(err)
	}
	written, err := json.Marshal(&Box{[]Wrap{w}, []Sealed{{"smtp", k.ID(), k.Seal("smtp", []byte("hunter2"))}, {"bad", k.ID(), []byte("x")}}})
	if err != nil {
		t.Fatal(err)
	}
	var box Box
	if err := json.Unmarshal(written, &box); err != nil {
		t.Fatal(err)
	}
	values, err := box.Open(own)
	if !errors.Is(err, ErrSealed) || len(values) != 1 || !bytes.Equal(values["smtp"], []byte("hunter2")) {
		t.Errorf("got %q, %v", values, err)
	}
	if values, err = box.Open(other); !errors.Is(err, ErrNotEntitled) || len(values) != 0 {
		t.Errorf("another node: got %q, %v", values, err)
	}
	if values, err = new(Box).Open(other); err != nil || len(values) != 0 {
		t.Errorf("an empty one: got %q, %v", values, err)
	}
}
