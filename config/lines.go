package config

import (
	"strings"
)

// A lineIndex says in which line of a TOML text each key and table stands, which the decoder does not tell. The text must
// be one that the decoder takes: this is no second parser, and what it does not find has line 0.
type lineIndex struct {
	// keys has every line in which a key's path ("smtp.listen", "domain.name") stands.
	keys map[string][]int
}

// indexLines walks over the text once. Inside multi-line strings and arrays nothing is a key.
func indexLines(text string) *lineIndex {
	ix := &lineIndex{keys: map[string][]int{}}
	table, depth, quote := "", 0, ""
	line := 0
	for raw := range strings.Lines(text) {
		line++
		s := strings.TrimSpace(raw)
		if depth == 0 && quote == "" {
			switch {
			case s == "" || s[0] == '#':
				continue
			case s[0] == '[':
				table = headerPath(s)
				ix.keys[table] = append(ix.keys[table], line)
				continue
			}
			key, value, _ := cutKey(s)
			if table != "" {
				key = table + "." + key
			}
			ix.keys[key] = append(ix.keys[key], line)
			s = value
		}
		depth, quote = skipValue(s, depth, quote)
	}
	return ix
}

// headerPath gives the path of "[table]" or "[[ array.of ]]".
func headerPath(s string) string {
	s = strings.TrimLeft(s, "[")
	if end := strings.IndexByte(s, ']'); end >= 0 {
		s = s[:end]
	}
	return barePath(s)
}

// cutKey splits a line at the '=' that stands outside of quotes.
func cutKey(s string) (key, value string, ok bool) {
	var quote byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quote == '"' && c == '\\':
			i++
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '=':
			return barePath(s[:i]), s[i+1:], true
		}
	}
	return barePath(s), "", false
}

// barePath takes quotes and blanks from a dotted key.
func barePath(s string) string {
	parts := strings.Split(s, ".")
	for i, p := range parts {
		parts[i] = strings.Trim(strings.TrimSpace(p), `"'`)
	}
	return strings.Join(parts, ".")
}

// skipValue walks over one line of a value and gives the depth of brackets, and the multi-line quote that is open, behind it.
func skipValue(s string, depth int, quote string) (int, string) {
	for i := 0; i < len(s); i++ {
		if quote != "" {
			switch {
			case quote[0] == '"' && s[i] == '\\':
				i++
			case strings.HasPrefix(s[i:], quote):
				i += len(quote) - 1
				quote = ""
			}
			continue
		}
		switch c := s[i]; c {
		case '#':
			return depth, quote
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '"', '\'':
			quote = string(c)
			if triple := strings.Repeat(quote, 3); strings.HasPrefix(s[i:], triple) {
				quote = triple
				i += 2
			}
		}
	}
	if len(quote) == 1 { // cannot be in a text that was decoded
		quote = ""
	}
	return max(depth, 0), quote
}

// line gives the n-th line (from 0) in which path stands; where it is not known, that of what it stands in.
func (ix *lineIndex) line(path string, n int) int {
	for {
		if lines := ix.keys[path]; len(lines) > 0 {
			return lines[min(n, len(lines)-1)]
		}
		dot := strings.LastIndexByte(path, '.')
		if dot < 0 {
			return 0
		}
		path = path[:dot]
	}
}

// all gives every line in which path stands.
func (ix *lineIndex) all(path string) []int { return ix.keys[path] }
