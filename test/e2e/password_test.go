package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// Passwords of these tests. They are typed, or in files: on no command line of theirs either.
const (
	rightPassword = "right Pässword 7 of root"
	wrongPassword = "wrong-Password-of-somebody"
)

// pamHelper builds mailproxy-pam as the Makefile does, into dir, and puts the file for PAM beside it.
func pamHelper(t *testing.T, dir string) {
	t.Helper()
	helper := filepath.Join(dir, "mailproxy-pam")
	out, err := exec.Command("make", "-s", "-C", filepath.Join("..", ".."), "PAM_HELPER="+helper, helper).CombinedOutput()
	if err != nil {
		t.Fatalf("make mailproxy-pam: %v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join("..", "..", "systemd", "mailproxy.pam"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "pam"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// write puts a text into a file of mode 0600 that the hosts have as /mnt/NAME.
func (h *host) write(name, text string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.shared, name), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// passwordHosts are a master with root's password and mailproxy-pam, which is not enabled, and a node that is in no cluster.
func passwordHosts(t *testing.T) (mx1, mx2 *host) {
	hosts := newHosts(t, 2)
	mx1, mx2 = hosts["mx1"], hosts["mx2"]
	pamHelper(t, mx1.shared)
	mx1.write("chpasswd", "root:"+rightPassword+"\n")
	mx1.write("right", rightPassword+"\nmore\n")
	mx1.write("wrong", wrongPassword+"\n")
	mx1.must("cp /mnt/pam /etc/pam.d/mailproxy && chpasswd </mnt/chpasswd && rm /mnt/chpasswd")
	for _, h := range []*host{mx1, mx2} {
		h.must("mailproxy init --name " + h.name + ".example.net --address " + h.address)
		h.must("systemctl enable --now mailproxy")
	}
	mx1.must("pmgcm create")
	return mx1, mx2
}

// refused wants a line to end with exit code 1, an error that begins so, and a hint that has some words.
func (h *host) refused(line, want, hint string) {
	h.t.Helper()
	out, code, err := h.run(line)
	if err != nil || code != 1 || !strings.Contains(out, "pmgcm: "+want) || !regexp.MustCompile(`\nhint: .*`+regexp.QuoteMeta(hint)).MatchString(out) {
		h.t.Errorf("%s# %s: exit code %d, %v\n%swant: %s; hint: … %s", h.name, line, code, err, out, want, hint)
	}
}

// A watch looks at the arguments and the environment of all processes, until its stop gives those that have had a word of these tests.
func watch(words ...string) (stop func() []string) {
	end := make(chan struct{})
	found := map[string]bool{}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, f := range files {
				said, _ := os.ReadFile(f) // it may have ended
				environment, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "environ"))
				for _, w := range words {
					if bytes.Contains(said, []byte(w)) || bytes.Contains(environment, []byte(w)) {
						found[fmt.Sprintf("%s: %q", f, said)] = true
					}
				}
			}
			select {
			case <-end:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	return func() []string {
		close(end)
		all.Wait()
		var list []string
		for f := range found {
			list = append(list, f)
		}
		return list
	}
}

// A node joins with the master's root password, as PAM there has it; and each refusal changes nothing.
func TestANodeJoinsWithTheRootPassword(t *testing.T) {
	t.Parallel()
	mx1, mx2 := passwordHosts(t)
	seen := watch(rightPassword, wrongPassword)
	fingerprint := regexp.MustCompile(`SHA256:\S+`).FindString(firstOf(mx1.run("pmgcm join-cmd")))
	join := "pmgcm join 192.0.2.11"
	pinned := join + " --fingerprint " + fingerprint
	prompt := "password of root on 192.0.2.11: "

	// Root has not said yet that this password may be asked about.
	mx2.refused(pinned+" --password-file /mnt/right", "the master cannot check passwords\n", `"systemctl enable --now mailproxy-pam.socket"`)
	mx1.must("systemctl enable --now mailproxy-pam.socket")

	// Nobody is asked for a password where something else answers, or where the key is not confirmed.
	for _, c := range []struct {
		line    string
		answers []asked
		want    string
	}{
		{join + " --fingerprint SHA256:AAAA", nil, "fingerprint does not match"},
		{join, []asked{{"(yes/no)?", "no", false}}, "was not confirmed"},
		{join, []asked{{"(yes/no)?", "yes", false}, {prompt, "", true}}, "pmgcm: wrong password\n"},
	} {
		out, code, err := mx2.typing(c.line, c.answers)
		if err != nil || code != 1 || !strings.Contains(out, c.want) || strings.Contains(out, prompt) != (len(c.answers) == 2) {
			t.Errorf("%s: exit code %d, %v\n%s", c.line, code, err, out)
		}
	}

	began := time.Now()
	mx2.refused(pinned+" --password-file /mnt/wrong", "wrong password\n", `root's on the master`)
	if took := time.Since(began); took < time.Second { // pam_unix: 2 s, and up to half of it more or less
		t.Errorf("a wrong password is answered after %v", took)
	}
	if out, code, err := mx2.run(pinned + " --dry-run --password-file - </mnt/right"); err != nil || code != 0 ||
		!strings.Contains(out, "take this node in as number 2") || !strings.HasSuffix(out, "dry run: nothing was changed\n") {
		t.Errorf("dry run: exit code %d, %v\n%s", code, err, out)
	}
	mx1.must("mailproxy setting set join_password no")
	mx2.refused(pinned+" --password-file /mnt/right", "this cluster takes no passwords\n", `"mailproxy setting set join_password yes"`)
	mx1.must("mailproxy setting unset join_password")

	// The third wrong one in a row is the last that is free; then also a right one has to wait.
	for range 3 {
		mx2.refused(pinned+" --dry-run --password-file /mnt/wrong", "wrong password\n", `root's on the master`)
	}
	mx2.refused(pinned+" --password-file /mnt/right", "too many wrong passwords: again in ", `"pmgcm join-cmd"`)
	if out, _, _ := mx2.run("pmgcm status"); !strings.Contains(out, "no cluster defined") {
		t.Errorf("refused, and there is a cluster:\n%s", out)
	}
	mx2.eventually(func() error {
		out, code, err := mx2.typing(join, []asked{{"(yes/no)?", "yes", false}, {prompt, rightPassword, true}})
		switch {
		case strings.Contains(out, "too many wrong passwords: again in ") || strings.Contains(out, "too many join attempts"):
			return errors.New(out)
		case err != nil || code != 0 || !strings.HasSuffix(out, "\njoined\n"):
			t.Fatalf("join: exit code %d, %v\n%s", code, err, out)
		}
		return nil
	})
	mx1.must("pmgcm status --wait")
	for _, l := range seen() {
		t.Errorf("a password is where others see it: %s", l)
	}
	for _, h := range []*host{mx1, mx2} { // logs, PostgreSQL's files, PAM's
		for _, w := range []string{rightPassword, wrongPassword} {
			h.write("word", w+"\n")
			if found, _, err := h.run("grep -arlFf /mnt/word /var/lib/mailproxy* /run /etc; rm /mnt/word"); found != "" || err != nil {
				t.Errorf("%s: a password is in %s, %v", h.name, found, err)
			}
		}
	}
	// Who asked, from where, with which key, and how it ended.
	key := firstOf(mx2.run(`cd /var/lib/mailproxy/keys && ssh-keygen -y -f node.key >/tmp/key.$$ && ssh-keygen -lf /tmp/key.$$; rm /tmp/key.$$`))
	for _, reason := range []string{"right", "refused"} {
		want := fmt.Sprintf(`"client":"192.0.2.12:[0-9]+","fingerprint":"%s",.*"reason":"%s".*"message":"join.password"`,
			regexp.QuoteMeta(strings.Fields(key + " - -")[1]), reason)
		if out, code, err := mx1.run("grep -E '" + want + "' /var/lib/mailproxy.log"); code != 0 || err != nil {
			t.Errorf("no such line in the log: %s: %v\n%s", want, err, out)
		}
	}
}

func firstOf(out string, _ int, _ error) string { return out }

// What mailproxy-pam answers, asked by the one who may.
func TestTheHelperAnswersForRootAlone(t *testing.T) {
	t.Parallel()
	h := newHosts(t, 1)["mx1"]
	pamHelper(t, h.shared)
	h.write("chpasswd", "root:"+rightPassword+"\n")
	h.must("cp /mnt/pam /etc/pam.d/mailproxy && chpasswd </mnt/chpasswd")
	for _, c := range []struct {
		name, before, question, want string
	}{
		{"the right password", "", "192.0.2.12\n" + rightPassword, "right\n"},
		{"another one", "", "192.0.2.12\n" + wrongPassword, "wrong\n"},
		{"more than the password", "", "192.0.2.12\n" + rightPassword + "\n", "wrong\n"},
		{"no password", "", "192.0.2.12\n", "wrong\n"},
		{"no question", "", rightPassword, ""},
		{"nothing", "", "", ""},
		{"a NUL in it", "", "192.0.2.12\n" + rightPassword + "\x00x", ""},
		{"1,024 bytes", "", "192.0.2.12\n" + strings.Repeat("x", 1013), "wrong\n"},
		{"1,025 bytes", "", "192.0.2.12\n" + strings.Repeat("x", 1014), ""},
		{"an account that has expired", "chage -E 1 root", "192.0.2.12\n" + rightPassword, "wrong\n"},
		{"a locked password", "chage -E -1 root && passwd -q -l root", "192.0.2.12\n" + rightPassword, "wrong\n"},
		{"no password, and root needs none", "passwd -q -d root", "192.0.2.12\n", "wrong\n"},
		{"an account that PAM cannot look up", "echo 'auth [default=die] pam_debug.so auth=authinfo_unavail' >/etc/pam.d/mailproxy", "192.0.2.12\nx", "error\n"},
	} {
		if c.before != "" {
			h.must(c.before)
		}
		h.write("question", c.question)
		out, code, err := h.run("/mnt/mailproxy-pam </mnt/question 2>/dev/null")
		if err != nil || out != c.want || (code == 0) != (c.want != "") {
			t.Errorf("%s: %q, exit code %d, %v; want %q", c.name, out, code, err, c.want)
		}
	}
}
