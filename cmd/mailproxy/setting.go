package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
)

func settingCommand() *cli.Command {
	return &cli.Command{
		Name: "setting", Usage: "limits and times of the whole cluster",
		Description: "Sizes are written as 50MB (powers of 1024), times as 90s, 5m, 5d.",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "show all settings", Flags: []cli.Flag{jsonFlag()}, Action: settingList,
				Description: "A * marks what was set, be it to the default; setting unset takes it back."},
			{Name: "get", Usage: "show one setting", ArgsUsage: "NAME", Flags: []cli.Flag{jsonFlag()}, Action: settingGet,
				Description: "Prints the value alone."},
			{Name: "set", Usage: "change a setting", ArgsUsage: "NAME VALUE", Action: onMaster(settingSet),
				Description: "Example: mailproxy setting set max_message_size 100MB"},
			{Name: "unset", Usage: "set a setting back to its default", ArgsUsage: "NAME", Action: onMaster(settingUnset),
				Description: "The default is what setting list shows in brackets; - is none."},
		},
	}
}

// settingView is one setting as it is in force.
type settingView struct {
	config.SettingInfo
	Value string `json:"value"`
	Set   bool   `json:"set"`
}

func viewSettings(s *config.Snapshot) []settingView {
	var views []settingView
	for _, info := range config.Settings() {
		v := settingView{SettingInfo: info, Value: info.Default}
		for _, row := range s.Settings {
			if row.Name == info.Name {
				v.Value, v.Set = row.Value, true
			}
		}
		views = append(views, v)
	}
	return views
}

func settingList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return viewSettings(s) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "SETTING", "VALUE", "WHAT IT IS")
		for _, v := range viewSettings(s) {
			value, help := v.Value, v.Help
			if v.Set {
				value += " *"
				help += fmt.Sprintf(" (default %s)", cmp.Or(v.Default, "-"))
			}
			t.row(v.Name, value, help)
		}
		return t.flush()
	})
}

func settingGet(c *cli.Context) error {
	name, err := settingName(c, 1)
	if err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		snapshot, err := s.Load(ctx)
		if err != nil {
			return err
		}
		views := viewSettings(snapshot)
		v := views[slices.IndexFunc(views, func(v settingView) bool { return v.Name == name })]
		if c.Bool("json") {
			return printJSON(c.App.Writer, v)
		}
		_, err = fmt.Fprintln(c.App.Writer, v.Value)
		return err
	})
}

func settingSet(c *cli.Context) error {
	name, err := settingName(c, 2)
	if err != nil {
		return err
	}
	value := c.Args().Get(1)
	if err := config.CheckSetting(name, value); err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, _ *config.Snapshot) error {
		return tx.PutSetting(ctx, config.Setting{Name: name, Value: value})
	})
	if err != nil {
		return err
	}
	return done(c, at, "setting %s is %s", name, cmpText(value, "empty"))
}

func settingUnset(c *cli.Context) error {
	name, err := settingName(c, 1)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if !slices.ContainsFunc(now.Settings, func(s config.Setting) bool { return s.Name == name }) {
			return withHint(fmt.Errorf("setting %s: is at its default", name), "mailproxy setting list")
		}
		return tx.DeleteSetting(ctx, name)
	})
	if err != nil {
		return err
	}
	return done(c, at, "setting %s is at its default", name)
}

// settingName gives the first of n arguments, which must be a setting's name.
func settingName(c *cli.Context, n int) (string, error) {
	args, err := arguments(c, n, n)
	if err != nil {
		return "", err
	}
	for _, info := range config.Settings() {
		if info.Name == args[0] {
			return args[0], nil
		}
	}
	return "", withHint(fmt.Errorf("setting %s: %w", args[0], config.CheckSetting(args[0], "")), "mailproxy setting list")
}
