package smtpd

import (
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/relay"
	"mailproxy/spool"
)

// A mixedCase is one message to several recipients, each a letter: a and b at the next hop one, c and d at the next hop two, e
// elsewhere (which is only queued), p postmaster at one. All were taken at RCPT; then the next hops answer as it says.
type mixedCase struct {
	name     string
	to       string
	one, two string // "a=550 dot=451"; what is not named is taken, "down" is out of reach

	client   string // code of the reply to the final dot
	taken    string // by a next hop
	queued   string // to be tried again
	reported string // in a DSN to the sender
	twice    bool   // counted as a possible duplicate
}

var mixedCases = []mixedCase{
	// One next hop.
	{"all are taken", "ab", "", "", "250", "ab", "", "", false},
	{"one is refused for good: a DSN", "ab", "b=550", "", "250", "a", "", "b", false},
	{"one is put off: queued", "ab", "b=451", "", "250", "a", "b", "", false},
	{"one of each", "abp", "a=550 b=451", "", "250", "p", "b", "a", false},
	{"421 for one is the end of the connection: nobody is taken", "ab", "b=421", "", "451", "", "", "", false},
	{"the sender is refused", "ab", "mail=550", "", "550", "", "", "", false},
	{"the sender is put off", "ab", "mail=451", "", "451", "", "", "", false},
	{"all are refused: nothing is queued, no DSN", "ab", "a=550 b=550", "", "550", "", "", "", false},
	{"all are refused, one for now: the client tries again", "ab", "a=550 b=451", "", "451", "", "", "", false},
	{"DATA is refused behind a mix", "ab", "b=550 data=554", "", "554", "", "", "", false},
	{"DATA is put off behind a mix", "ab", "b=550 data=451", "", "451", "", "", "", false},
	{"the dot is refused behind a mix: nobody has it, no DSN", "ab", "b=451 dot=550", "", "550", "", "", "", false},
	{"the dot is put off behind a mix: the client tries again for all", "ab", "b=550 dot=451", "", "451", "", "", "", false},
	{"lost at MAIL: as if it were out of reach", "ab", "mail=close", "", "250", "", "ab", "", false},
	{"lost at RCPT", "ab", "b=close", "", "451", "", "", "", false},
	{"lost at DATA", "ab", "b=550 data=close", "", "451", "", "", "", false},
	{"lost in the body", "ab", "b=451 body=close", "", "451", "", "", "", false},
	{"lost behind the dot: perhaps taken", "ab", "b=451 dot=close", "", "451", "", "", "", true},
	{"nonsense to the dot: perhaps taken", "ab", "b=550 dot=nonsense", "", "451", "", "", "", true},
	{"silent at RCPT", "ab", "b=hang", "", "451", "", "", "", false},
	{"silent behind the dot: perhaps taken", "ab", "dot=hang", "", "451", "", "", "", true},
	{"out of reach", "ab", "down", "", "250", "", "ab", "", false},

	// Several: the first that takes anything answers.
	{"both would take it: the second through the queue", "ac", "", "", "250", "a", "c", "", false},
	{"and what goes elsewhere", "ace", "", "", "250", "a", "ce", "", false},
	{"a mix at the first", "abc", "b=550", "", "250", "a", "c", "b", false},
	{"the first refuses its own: the second answers", "abc", "a=550 b=550", "", "250", "c", "", "ab", false},
	{"the first puts its own off: the second answers", "abc", "a=451 b=550", "", "250", "c", "a", "b", false},
	{"the first refuses the sender, the second does not", "ac", "mail=550", "", "250", "c", "", "a", false},
	{"the first is lost at RCPT: the second answers", "ac", "a=close", "", "250", "c", "a", "", false},
	{"the first refuses DATA: the second answers", "acd", "data=554", "d=451", "250", "c", "d", "a", false},
	{"both have a mix", "abcd", "a=550 b=550", "c=451", "250", "d", "c", "ab", false},
	{"the first refuses the dot: that is the message's end", "ac", "dot=550", "", "550", "", "", "", false},
	{"the first puts the dot off", "ac", "dot=451", "", "451", "", "", "", false},
	{"the second refuses the dot behind the first's refusals", "ac", "a=550", "dot=554", "554", "", "", "", false},
	{"the second puts the dot off behind the first's refusals", "ac", "a=550", "dot=451", "451", "", "", "", false},
	{"no answer to the first's dot", "ac", "dot=close", "", "451", "", "", "", true},
	{"no answer to the second's dot, behind the first's refusals", "ac", "a=550", "dot=close", "451", "", "", "", true},
	{"the first is lost in the body: the second answers", "ac", "body=close", "", "250", "c", "a", "", false},
	{"the first is out of reach: the second is not asked", "ac", "down", "", "250", "", "ac", "", false},
	{"the second is out of reach", "ac", "", "down", "250", "a", "c", "", false},
	{"the first refuses its own, the second is out of reach", "abc", "a=550 b=451", "down", "250", "", "bc", "a", false},
	{"both are out of reach", "ace", "down", "down", "250", "", "ace", "", false},
	{"both refuse all", "abc", "a=550 b=550", "c=550", "550", "", "", "", false},
	{"both refuse all, one for now", "ac", "a=550", "c=451", "451", "", "", "", false},
	{"both refuse all, and one goes elsewhere", "ace", "a=550", "c=550", "250", "", "e", "ac", false},

	// Postmaster is taken whatever its next hop thinks of it.
	{"postmaster is refused: queued", "p", "p=550", "", "250", "", "p", "", false},
	{"postmaster is refused with others", "ap", "a=550 p=550", "", "250", "", "p", "a", false},
	{"postmaster is refused beside one that is taken", "ap", "p=550", "", "250", "a", "", "p", false},
	{"a message that is refused is refused for postmaster too", "p", "dot=554", "", "554", "", "", "", false},
}

func TestMixedAnswers(t *testing.T) {
	for _, c := range mixedCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got := play(t, c.to, c.one, c.two)
			got.name = c.name
			if got != c {
				t.Errorf("\n got %+v\nwant %+v", got, c)
			}
		})
	}
}

// Whatever two next hops say: a 250 has promised each recipient exactly one of three things, and no 250 leaves nothing behind.
func TestMixedAnswersLoseNobody(t *testing.T) {
	says := []string{
		"", "a=550", "a=451", "a=550 b=451", "a=550 b=550", "a=451 b=451", "mail=550", "mail=451", "mail=close", "data=451", "data=554",
		"b=close", "data=close", "body=close", "dot=550", "dot=451", "dot=close", "b=451 dot=close", "b=550 dot=451", "down",
	}
	forTwo := strings.NewReplacer("a=5", "c=5", "a=4", "c=4", "b=", "d=")
	for _, one := range says {
		for _, two := range says {
			two = forTwo.Replace(two)
			t.Run(one+" | "+two, func(t *testing.T) {
				t.Parallel()
				got := play(t, "abcde", one, two)
				want := 0
				if got.client == "250" {
					want = 1
				}
				for _, r := range got.to {
					if n := strings.Count(got.taken+got.queued+got.reported, string(r)); n != want {
						t.Errorf("%c stands %d times in: %+v", r, n, got)
					}
				}
				// A hop that closes inside the body may have been sent the dot by then.
				if got.twice && (got.client != "451" || !strings.Contains(one+two, "dot=close") && !strings.Contains(one+two, "body=close")) {
					t.Errorf("counted as a possible duplicate: %+v", got)
				}
			})
		}
	}
}

var mixedPaths = map[rune]string{
	'a': "a@one.test", 'b': "b@one.test", 'c': "c@two.test", 'd': "d@two.test", 'e': "e@else.test", 'p': "postmaster@one.test",
}

// letters gives the recipients that stand in a text, in the order of the alphabet.
func letters(text string) string {
	var all []rune
	for l, path := range mixedPaths {
		if strings.Contains(text, path) {
			all = append(all, l)
		}
	}
	slices.Sort(all)
	return string(all)
}

// play sends the message and gives what came of it.
func play(t *testing.T, to, one, two string) mixedCase {
	t.Helper()
	first, second := newHop(t), newHop(t)
	s := snapshot("one.test", first.addr(), "two.test", second.addr())
	s.Networks = []config.Network{loopback}
	g := newRig(t, s, func(o *Options) {
		o.Relay = relay.New(relay.Options{Hostname: "mx.test", Timeouts: relay.Timeouts{Rcpt: time.Second, Dot: time.Second}})
		t.Cleanup(o.Relay.Close)
	})
	p := g.hello()
	var recipients []string
	for _, r := range to {
		recipients = append(recipients, mixedPaths[r])
	}
	p.begin(recipients...)
	first.answerAs(one)
	second.answerAs(two)
	p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
	got := mixedCase{to: to, one: one, two: two, client: p.read()[:3], twice: g.server.Stats().Duplicates > 0}
	var taken strings.Builder
	for _, h := range []*hop{first, second} {
		for _, m := range h.messages() {
			taken.WriteString(strings.Join(m.to, " ") + " ")
		}
	}
	got.taken = letters(taken.String())
	got.queued, got.reported = spooled(t, g)
	return got
}

// answerAs sets what a next hop answers from now on, as in mixedCase.
func (h *hop) answerAs(say string) {
	for word := range strings.FieldsSeq(say) {
		key, answer, _ := strings.Cut(word, "=")
		switch {
		case word == "down":
			h.close()
			continue
		case len(key) == 1:
			key = "rcpt " + mixedPaths[rune(key[0])]
		}
		if answer[0] == '4' || answer[0] == '5' {
			answer += " " + answer[:1] + ".0.0 so it is"
		}
		h.set(key, answer)
	}
}

// spooled gives who is to be tried again, and who was reported; nothing may be held.
func spooled(t *testing.T, g *rig) (queued, reported string) {
	t.Helper()
	there, _, err := spool.Inspect(g.spool)
	for errors.Is(err, fs.ErrNotExist) { // a segment was tidied away meanwhile
		there, _, err = spool.Inspect(g.spool)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	var items, dsns strings.Builder
	for _, i := range g.queue.List() {
		if i.Unanswered {
			t.Errorf("held: %+v", i)
		}
		if !i.ReversePath.IsNull() {
			items.WriteString(joined(i.ForwardPaths) + " ")
			continue
		}
		m, err := there.Open(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(m.Content)
		m.Close()
		if err != nil || joined(i.ForwardPaths) != "a@sender.test" {
			t.Errorf("DSN to %s, %v", joined(i.ForwardPaths), err)
		}
		for line := range strings.SplitSeq(string(text), "\r\n") {
			if strings.HasPrefix(line, "Final-Recipient: ") {
				dsns.WriteString(line + " ")
			}
		}
	}
	return letters(items.String()), letters(dsns.String())
}
