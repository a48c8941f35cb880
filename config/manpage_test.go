package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// tomlKeys gives the keys of a struct and of the tables in it.
func tomlKeys(t reflect.Type) []string {
	var keys []string
	for f := range t.Fields() {
		key := f.Tag.Get("toml")
		if key == "-" {
			continue
		}
		keys = append(keys, key)
		inner := f.Type
		if inner.Kind() == reflect.Slice {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct {
			keys = append(keys, tomlKeys(inner)...)
		}
	}
	return keys
}

func TestTheManPageHasEveryKey(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "man", "mailproxy.8.in"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(page), "\n.SH NODE FILE\n")
	node, text, ok := strings.Cut(text, "\n.SH CONFIGURATION TEXT\n")
	text, _, ends := strings.Cut(text, "\n.SH ")
	if !ok || !ends {
		t.Fatal("the sections are not there")
	}
	word := func(r rune) bool { return !('a' <= r && r <= 'z' || r == '_') }
	for section, keys := range map[string][]string{node: tomlKeys(reflect.TypeFor[Local]()), text: tomlKeys(reflect.TypeFor[textFile]())} {
		words := map[string]bool{}
		for line := range strings.Lines(section) {
			if !strings.HasPrefix(line, ".B") && !strings.HasPrefix(line, `\fB`) {
				continue
			}
			for _, w := range strings.FieldsFunc(line, word) {
				words[w] = true
			}
		}
		for _, key := range keys {
			if !words[key] {
				t.Errorf("%s is not described", key)
			}
		}
	}
}
