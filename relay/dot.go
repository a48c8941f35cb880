package relay

import "bytes"

var lineDot = []byte("\n.")

// appendStuffed appends src to dst with a dot put before each dot at a line's start (RFC 5321 §4.5.2), in whole stretches.
// start says whether src begins a line; the second result whether what follows src would.
func appendStuffed(dst, src []byte, start bool) ([]byte, bool) {
	if len(src) == 0 {
		return dst, start
	}
	if start && src[0] == '.' {
		dst = append(dst, '.')
	}
	end := src[len(src)-1] == '\n'
	for {
		i := bytes.Index(src, lineDot)
		if i < 0 {
			return append(dst, src...), end
		}
		dst = append(append(dst, src[:i+1]...), '.')
		// The dot itself stays for the next stretch, which cannot find it again: its line end is behind us.
		src = src[i+1:]
	}
}
