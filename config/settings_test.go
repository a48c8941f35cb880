package config

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"mailproxy/mail"
)

func TestValuesAreTheDefaultsOverlaidByTheRows(t *testing.T) {
	v, err := new(Snapshot).Values()
	if err != nil {
		t.Fatal(err)
	}
	if v.MaxMessageSize != 50<<20 || v.QueueLife != 5*24*time.Hour || !v.CutThrough || !v.Postmaster.IsNull() {
		t.Errorf("defaults: %+v", v)
	}
	s := &Snapshot{Settings: []Setting{{"max_message_size", "1MB"}, {"cut_through", "no"}, {"postmaster", "pm@example.test"},
		{"queue_life", "2d"}, {"max_recipients", "200"}, {"outbound_transport", "smart"}}}
	v, err = s.Values()
	if err != nil {
		t.Fatal(err)
	}
	want := mail.Path{Local: "pm", Domain: "example.test"}
	if v.MaxMessageSize != 1<<20 || v.CutThrough || v.Postmaster != want || v.QueueLife != 48*time.Hour || v.MaxRecipients != 200 ||
		v.OutboundTransport != "smart" || v.MaxErrors != 20 {
		t.Errorf("overlaid: %+v", v)
	}
}

func TestValuesNameEverySettingThatIsWrongAndKeepItsDefault(t *testing.T) {
	s := &Snapshot{Settings: []Setting{{"max_recipients", "5"}, {"queue-life", "5d"}, {"idle_timeout", "soon"}, {"max_errors", "9"}}}
	v, err := s.Values()
	problems := Problems(err)
	if len(problems) != 3 {
		t.Fatalf("problems: %v", err)
	}
	for i, want := range []string{"setting max_recipients: 5 is out of bounds, want 100 to 100000",
		"setting queue-life: no such setting, did you mean queue_life?",
		`setting idle_timeout: "soon" is not a length of time, want a number with s, m, h or d, such as 90s or 5d`} {
		if problems[i].Error() != want {
			t.Errorf("got  %s\nwant %s", problems[i], want)
		}
	}
	if v.MaxRecipients != 1000 || v.IdleTimeout != 5*time.Minute || v.MaxErrors != 9 {
		t.Errorf("values: %+v", v)
	}
}

func TestEverySettingHasABoundAndAHelp(t *testing.T) {
	infos := Settings()
	if !slices.IsSortedFunc(infos, func(a, b SettingInfo) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("not sorted by name")
	}
	for _, i := range infos {
		if i.Help == "" || strings.HasSuffix(i.Help, ".") {
			t.Errorf("%s: help %q", i.Name, i.Help)
		}
		if err := CheckSetting(i.Name, i.Default); err != nil {
			t.Errorf("%s: default: %v", i.Name, err)
		}
		if err := CheckSetting(i.Name, "\x00 no value of any kind"); err == nil {
			t.Errorf("%s: takes anything", i.Name)
		}
	}
}

func TestBoundsOfSettings(t *testing.T) {
	for _, c := range []struct {
		name, value string
		ok          bool
	}{
		{"max_message_size", "64kB", true}, {"max_message_size", "65535B", false}, {"max_message_size", "3GB", false},
		{"max_line_length", "998", true}, {"max_line_length", "997", false},
		{"idle_timeout", "1h", true}, {"idle_timeout", "61m", false},
		{"delay_notice", "0s", true}, {"delay_notice", "0", true}, {"delay_notice", "31d", false}, {"delay_notice", "-1h", false},
		{"queue_life", "30d", true}, {"queue_life", "31d", false}, {"queue_life", "59s", false},
		{"postmaster", "postmaster", false}, {"postmaster", "a b@c", false}, {"postmaster", "", true},
		{"outbound_transport", "a:b", false}, {"outbound_transport", "", true}, {"outbound_transport", "-a", false},
		{"cut_through", "off", true}, {"cut_through", "maybe", false},
	} {
		if err := CheckSetting(c.name, c.value); (err == nil) != c.ok {
			t.Errorf("%s = %q: %v", c.name, c.value, err)
		}
	}
}

func TestAddressesAndNetworksOfASetting(t *testing.T) {
	s := Snapshot{Settings: []Setting{{Name: "proxy_from", Value: "192.0.2.1, 10.0.0.0/8,2001:db8::/32  ::ffff:192.0.2.2"}}}
	v, err := s.Values()
	if err != nil || fmt.Sprint(v.ProxyFrom) != "[192.0.2.1/32 10.0.0.0/8 2001:db8::/32 192.0.2.2/32]" || v.XclientFrom != nil {
		t.Errorf("%v, %v, %v", v.ProxyFrom, v.XclientFrom, err)
	}
	for value, want := range map[string]string{
		"lb.example.test": `"lb.example.test" is neither an IP address nor a network`, "fe80::1%eth0": "neither", "0.0.0.0/0": "is everyone",
		"10.0.0.1/8": "want 10.0.0.0/8", "::/0": "is everyone", "10.0.0.0/33": "neither", strings.Repeat("10.0.0.1 ", 1001): "at most 1000",
	} {
		if err := CheckSetting("xclient_from", value); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", value, err, want)
		}
	}
}
