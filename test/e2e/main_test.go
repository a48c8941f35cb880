package e2e

import (
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"

	"mailproxy/internal/testbin"
	"mailproxy/test/lab"
)

// TestMain runs the tests in a sandbox of their own.
func TestMain(m *testing.M) {
	lab.Main(func() int {
		flag.Parse()
		given := false
		flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
		if !given { // they wait, most of the time
			if err := flag.Set("test.parallel", "6"); err != nil {
				fmt.Fprintln(os.Stderr, "e2e:", err)
				return 1
			}
		}
		return testbin.Main(m, "mailproxy", "pmgcm")
	})
}

// network is the lab that all nodes of the tests are hosts of.
var network = sync.OnceValues(func() (*lab.Lab, error) {
	dir, err := shortDir()
	if err != nil {
		return nil, err
	}
	return lab.New(dir, testbin.Dir())
})

// shortDir gives a directory that everyone may enter, with a path short enough for sockets.
func shortDir() (string, error) { return lab.TempDir() }

// template gives the directory of a fresh database.
func template() (string, error) {
	l, err := network()
	if err != nil {
		return "", err
	}
	return l.Template()
}
