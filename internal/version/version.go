// Package version says which build this is.
package version

import (
	"runtime/debug"
)

// Version and Commit are set by the linker: go build -ldflags "-X mailproxy/internal/version.Version=1.2 -X …Commit=abc1234".
// They are not changed afterwards.
var (
	Version = "0.0-dev"
	Commit  = ""
)

// String gives "1.2 (commit abc1234)", as --version shows it.
func String() string {
	c := commit()
	if c == "" {
		c = "unknown"
	}
	return Version + " (commit " + c + ")"
}

// commit falls back to what the Go command wrote into the program.
func commit() string {
	if Commit != "" {
		return Commit
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return ""
}
