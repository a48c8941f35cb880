package mta

import (
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// StartPostgrey runs Debian's postgrey, which puts off what it has not seen before, and gives the address at which Postfix asks it by
// check_policy_service. What comes again after delay, of whole seconds, is taken.
func StartPostgrey(t testing.TB, delay time.Duration) (addr string) {
	t.Helper()
	dir := filepath.Join(folder(t), "db")
	give(t, "postgrey", dir)
	addr = FreeAddr(t)
	Start(t, addr, "/usr/sbin/postgrey", "--inet="+addr, "--dbdir="+dir, "--delay="+strconv.Itoa(int(delay/time.Second)))
	return addr
}
